#!/usr/bin/env bash
# prepare_studies.sh DATA OUT: packs what studies/config.py reads beside what prepare.sh DATA OUT has
# packed: wrong captions, curated web images, and the photos with captions of each of six languages.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: prepare_studies.sh DATA OUT" >&2; exit 2; }
data=$1 out=$2
for file in "$out"/matched/{flickr8k,cc3m,emoji}/drop.parquet "$out/scans/cc3m.parquet"; do
    [ -e "$file" ] || { echo "prepare_studies.sh: $file is missing; run prepare.sh first" >&2; exit 2; }
done
for file in flickr8k/train.{jsonl,zip} cc3m/train.jsonl emoji/twemoji.zip text/bert-base-uncased-vocab.txt; do
    [ -e "$data/$file" ] || { echo "prepare_studies.sh: $data/$file is missing" >&2; exit 2; }
done

declare -A table=(
    [flickr8k]="$data/flickr8k/train.jsonl" [cc3m]="$data/cc3m/train.jsonl"
    [emoji]="$out/twemoji.jsonl"
)
declare -A images=(
    [flickr8k]="$data/flickr8k/train.zip" [cc3m]="$data/cc3m/*.zip"
    [emoji]="$data/emoji/twemoji.zip"
)

# A share of the images, larger ones holding the smaller, each gets all captions of another of them.
for percent in 25 50 75; do
    folder="$out/wrong$percent"
    mkdir -p "$folder"
    for name in flickr8k cc3m emoji; do
        python - "${table[$name]}" "$percent" "$folder/$name.jsonl" <<'EOF'
import json
import random
import sys

table, percent, out = sys.argv[1:]
rows = [json.loads(line) for line in open(table)]
order = list(range(len(rows)))
random.Random(0).shuffle(order)
chosen = order[: len(rows) * int(percent) // 100]
captions = [rows[index]["captions"] for index in chosen]
for index, others in zip(chosen, captions[1:] + captions[:1], strict=True):
    rows[index]["captions"] = others
with open(out, "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
EOF
        align pack "$folder/$name.jsonl?images=${images[$name]}" --out "$folder/$name" \
            --drop "$out/matched/$name/drop.parquet"
    done
done

# MetaCLIP's 500,000 entries are not here; lower-case words of bert-base-uncased take their place,
# and a cap of 3 pairs an entry that of 20,000: at its own nothing of 10,000 pairs would be dropped.
grep -E '^[a-z]{3,}$' "$data/text/bert-base-uncased-vocab.txt" > "$out/entries.txt"
here=$(dirname "$0")
small="$here/../curation/small_images.py" # the rules of ALIGN, for pictures of 128 px
align curate "$out/scans/cc3m.parquet" --preset "$small" --out "$out/curated/align"
align curate "$out/scans/cc3m.parquet" --preset metaclip --metadata "$out/entries.txt" --seed 1 \
    --cap 3 --out "$out/curated/metaclip"
for preset in align metaclip; do
    align pack "${table[cc3m]}?images=${images[cc3m]}" --out "$out/cc3m_$preset" \
        --keep "$out/curated/$preset/kept.parquet" --drop "$out/matched/cc3m/drop.parquet"
done

for language in en de fr cs zh ar; do
    source="${table[flickr8k]}?images=${images[flickr8k]}"
    [ $language = en ] || source="$source&lang=$language"
    align pack "$source" --out "$out/flickr8k_$language" --drop "$out/matched/flickr8k/drop.parquet"
done
