"""curate/filter/unigrams.py: words of scripts without spaces, and what the rules make of them."""

import pyarrow as pa
import pytest
from curate_helpers import curate_table, reasons

from align_jax.curate.filter import curate as curate_lib
from align_jax.curate.filter import unigrams

# The words as a reader divides them, where readers agree.
DIVIDED = {
    "一只猫坐在红色的沙发上": "一只 猫 坐在 红色 的 沙发 上",
    "แมวนั่งอยู่บนโซฟาสีแดง": "แมว นั่ง อยู่ บน โซฟา สี แดง",
    "東京の古い寺": "東京 の 古い 寺",
    "ແມວນັ່ງຢູ່ເທິງ": "ແມວ ນັ່ງ ຢູ່ ເທິງ",
    "iphone手机壳 for 女生": "iphone 手机 壳 for 女生",
    "「猫」、犬。dog-house!": "「猫」、 犬。 dog-house!",
    "😀 红色😀汽车": "😀 红色😀 汽车",
    "don't stop, a-b c.d": "don't stop, a-b c.d",
    "한국어 문장입니다": "한국어 문장입니다",
    "ёлка naïve": "ёлка naïve",
    "": "",
}
CAPTIONS = {  # of 3 to 20 words
    "Chinese": "一只猫坐在红色的沙发上看着窗外的小鸟",
    "Chinese, traditional": "兩個孩子在海邊的沙灘上玩球",
    "Japanese": "公園のベンチに座って本を読んでいる女性",
    "Thai": "ผู้ชายคนหนึ่งกำลังขี่จักรยานบนถนน",
    "Lao": "ແມວນັ່ງຢູ່ເທິງໂຕະ",
    "Khmer": "ឆ្មាអង្គុយលើតុ",
    "Burmese": "ကြောင်လေးတစ်ကောင်ထိုင်နေသည်",
    "Tibetan": "བོད་སྐད་ཡིག་ཆ",
    "Korean": "고양이 한 마리가 소파에 앉아 있다",
}


@pytest.fixture
def icu():
    pytest.importorskip("icu4py")


def test_words_are_divided_where_readers_divide_them(icu):
    made = unigrams.divide(pa.array(list(DIVIDED))).to_pylist()
    assert made == list(DIVIDED.values())


def test_dividing_again_changes_nothing(icu):
    texts = pa.array([*DIVIDED.values(), *CAPTIONS.values()])
    once = unigrams.divide(texts)
    assert unigrams.divide(once) == once
    assert [text.replace(" ", "") for text in once.to_pylist()] == [
        text.replace(" ", "") for text in texts.to_pylist()
    ]


def test_scripts_without_spaces_are_known_by_any_of_their_characters():
    inside = "ก๛ກ་ကၐក々〇ぁんァー㐀一龿ｱ𠀀𱍐豈"
    outside = "aéЖא한ㄱ、。「！Ａ1 \u0dff\u10a0\u3004\u3100"
    found = unigrams.are_unspaced(pa.array([f"x{c}" for c in inside + outside])).to_pylist()
    assert found == [True] * len(inside) + [False] * len(outside)


@pytest.mark.parametrize("language", CAPTIONS)
def test_align_keeps_captions_of_3_to_20_words_in_every_script(icu, tmp_path, language):
    made, _ = curate_table(tmp_path, {"text": [CAPTIONS[language]]}, "num_words(3, 20)")
    assert made["rows_kept"] == 1


def test_bounds_count_words_and_those_between_spaces_count_spaces(icu, tmp_path):
    texts = [
        "红色的",
        "红色的汽车",
        "红色 的 车",
        "a red car",
        "红色的汽车 a b",
        "汽车" * 20,
        "汽车" * 21,
    ]
    found = reasons(tmp_path / "a", {"text": texts}, "num_words(3, 20)")
    assert sorted(found) == [0, 6]
    found = reasons(tmp_path / "b", {"text": texts}, "num_words(3, spaced=True)")
    assert sorted(found) == [0, 1, 5, 6]


def test_characters_are_those_of_the_text_not_of_its_words(icu, tmp_path):
    texts = ["红色的汽车在路", "红色的汽车 在路"]
    assert sorted(reasons(tmp_path, {"text": texts}, "num_chars(8)")) == [0]


def test_rare_tokens_are_words_of_the_script(icu, tmp_path):
    texts = ["红色的汽车"] * 3 + ["红色的沙发"]
    # 红色, 的 and 红色 的: 4 times; 汽车 and 的 汽车: 3 times; the others once
    assert sorted(reasons(tmp_path, {"text": texts}, "rare_tokens(top=4)")) == [3]


def test_the_report_says_how_many_texts_and_what_divided_them(icu, tmp_path):
    texts = [*CAPTIONS.values(), "a red car"]
    made, out = curate_table(tmp_path, {"text": texts}, "num_words(3, 20)")
    assert made["texts_unspaced"] == 8 and made["segmenter"].startswith("ICU ")
    line = f"8 texts in scripts without spaces, words by {made['segmenter']}."
    assert line in (out / "report.md").read_text()
    assert "8  texts in scripts without spaces, words by ICU" in curate_lib.format_counts(made)


def test_without_icu_the_texts_are_counted_and_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(unigrams, "segmenter", lambda: None)
    texts = [CAPTIONS["Chinese"], CAPTIONS["Thai"], "a red car"]
    made, out = curate_table(tmp_path, {"text": texts}, "num_words(3, 20)")
    assert made["rows_kept"] == 1 and made["texts_unspaced"] == 2 and made["segmenter"] is None
    for shown in (curate_lib.format_counts(made), (out / "report.md").read_text()):
        assert "none are found but between white space: pip install icu4py" in shown
    made, _ = curate_table(tmp_path / "english", {"text": ["a red car"]}, "num_words(3, 20)")
    assert "icu4py" not in curate_lib.format_counts(made)


def test_a_folder_made_without_icu_is_refused_with_it(icu, tmp_path, monkeypatch):
    table = {"text": [CAPTIONS["Chinese"]]}
    with monkeypatch.context() as without:
        without.setattr(unigrams, "segmenter", lambda: None)
        curate_table(tmp_path, table, "num_words(3, 20)")
    with pytest.raises(ValueError, match="holds the result of other input, rules or options"):
        curate_table(tmp_path, table, "num_words(3, 20)")
