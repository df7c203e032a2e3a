#!/usr/bin/env bash
# prepare.sh DATA OUT: packs the training sets of configs/real_pairs.py without what is also in an
# evaluation set, and leaves the reports of the search in OUT/matched.
#
# DATA holds flickr8k/{train,dev}.{jsonl,zip}, cc3m/train.jsonl with shards *.zip, emoji/emoji.jsonl
# (hex, label, tags, vendors) with twemoji.zip and openmoji.zip, and of evaluation sets that are
# there too: cifar10/test.zip, imagenette/train_subset.zip, imagenet_sample/{labels.tsv,images.zip}.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: prepare.sh DATA OUT" >&2; exit 2; }
data=$1 out=$2
for file in flickr8k/{train,dev}.{jsonl,zip} cc3m/train.jsonl emoji/{emoji.jsonl,twemoji.zip,openmoji.zip}; do
    [ -e "$data/$file" ] || { echo "prepare.sh: $data/$file is missing" >&2; exit 2; }
done
mkdir -p "$out/scans"

# Twemoji to learn from, with its keywords as a second caption; OpenMoji to be found by its name.
python - "$data/emoji/emoji.jsonl" "$out" <<'EOF'
import json
import sys

table, out = sys.argv[1:]
files = {vendor: open(f"{out}/{vendor}.jsonl", "w") for vendor in ("twemoji", "openmoji")}
for row in map(json.loads, open(table)):
    captions = [row["label"]]
    tags = [f"{row['label']}: {', '.join(row['tags'])}"] if row["tags"] else []
    for vendor, extra in (("twemoji", tags), ("openmoji", [])):
        if vendor in row["vendors"]:
            line = {"image": row["hex"] + ".png", "captions": captions + extra}
            files[vendor].write(json.dumps(line) + "\n")
EOF

flickr8k="$data/flickr8k/train.jsonl?images=$data/flickr8k/train.zip"
cc3m="$data/cc3m/train.jsonl?images=$data/cc3m/*.zip"
emoji="$out/twemoji.jsonl?images=$data/emoji/twemoji.zip"
dev="$data/flickr8k/dev.jsonl?images=$data/flickr8k/dev.zip"
openmoji="$out/openmoji.jsonl?images=$data/emoji/openmoji.zip"

against=()
add() { # add NAME SOURCE [--labelled]
    align scan "$2" "${@:3}" --out "$out/scans/$1.parquet"
    against+=(--against "$out/scans/$1.parquet")
}
labels="$data/imagenet_sample/labels.tsv" # index, file, wnid, name, without a line of names
if [ -e "$labels" ]; then
    { printf 'index\timage\twnid\tcaption\tclip\n' && cat "$labels"; } > "$out/imagenet_sample.tsv"
    add imagenet_sample "$out/imagenet_sample.tsv?images=$data/imagenet_sample/images.zip"
fi
add flickr8k_dev "$dev"
add openmoji "$openmoji"
for set in cifar10/test imagenette/train_subset; do
    [ ! -e "$data/$set.zip" ] || add "${set%/*}" "$data/$set.zip" --labelled
done

for name in flickr8k cc3m emoji; do
    align scan "${!name}" --out "$out/scans/$name.parquet"
    align decontaminate "$out/scans/$name.parquet" "${against[@]}" --out "$out/matched/$name"
    align pack "${!name}" --out "$out/$name" --drop "$out/matched/$name/drop.parquet"
done
align pack "$dev" --out "$out/flickr8k" --split dev
align pack "$openmoji" --out "$out/emoji" --split openmoji
