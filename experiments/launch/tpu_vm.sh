#!/usr/bin/env bash
# Runs align_jax on Cloud TPU VMs, one slice or several; the page to it is docs/tpu.md.
# Flags follow Google's reference of gcloud; this project has not run it on a Cloud TPU.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: tpu_vm.sh [--dry-run] COMMAND

  create            ask for the slice(s) and wait until they are there
  install           copy this checkout to all hosts and install it
  run train ARGS    start `align train ARGS` on all hosts, in the background
  logs              follow the log of the host that reports; Ctrl-C leaves the run alone
  status            state of the slice(s); on each host, whether the run is alive
  stop              let the run save a checkpoint and end, on all hosts
  resume train ARGS make what is missing (slices, install), then run
  delete            give the slice(s) back

--dry-run prints the gcloud commands instead.

environment:
  NAME         of the queued resource; its hosts are found by it
  ZONE         e.g. us-west4-a
  ACCELERATOR  type of a slice, e.g. v5litepod-64, v6e-256, v5p-128, v4-64
  PROJECT      default: gcloud's own
  RUNTIME      software version; default: Google's for the accelerator
  SLICES       number of slices (default: 1)
  SPOT         1: cheaper, may be preempted
  BUCKET       mounted at /mnt/gcs on all hosts, for data and workdir
EOF
}

main() {
    dry_run=""
    if [ "${1:-}" = --dry-run ]; then
        dry_run=1
        shift
    fi
    local command="${1:-}"
    [ $# -eq 0 ] || shift
    case $command in
        create | install | logs | status | stop | delete)
            [ $# -eq 0 ] || die "$command takes no arguments, not '$*'."
            ;;
        run | resume)
            [ "${1:-}" = train ] || die "$command needs 'train' and its arguments."
            ;;
        -h | --help)
            usage
            return
            ;;
        *) die "unknown command '$command'; see tpu_vm.sh --help." ;;
    esac
    settings
    "do_$command" "$@"
}

settings() {
    local name
    for name in NAME ZONE ACCELERATOR; do
        [ -n "${!name:-}" ] || die "$name is not set; see tpu_vm.sh --help."
    done
    SLICES="${SLICES:-1}" SPOT="${SPOT:-}" BUCKET="${BUCKET:-}"
    case $ACCELERATOR in
        v6e-*) RUNTIME="${RUNTIME:-v2-alpha-tpuv6e}" ;;
        v5p-*) RUNTIME="${RUNTIME:-v2-alpha-tpuv5}" ;;
        v5litepod-*) RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}" ;;
        v4-*) RUNTIME="${RUNTIME:-tpu-ubuntu2204-base}" ;;
        *) [ -n "${RUNTIME:-}" ] || die "ACCELERATOR=$ACCELERATOR is not known; set RUNTIME, too." ;;
    esac
    where=("$NAME" --zone="$ZONE")
    [ -z "${PROJECT:-}" ] || where+=(--project="$PROJECT")
    everywhere=(--node=all --worker=all)
    root="$(cd "$(dirname "$0")/../.." && pwd)"
}

do_create() {
    local nodes=(--node-id="$NAME")
    [ "$SLICES" = 1 ] || nodes=(--node-count="$SLICES" --node-prefix="$NAME")
    [ "$SPOT" != 1 ] || nodes+=(--spot)
    # The scope lets the hosts read and write buckets.
    queued_resources create "${where[@]}" "${nodes[@]}" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" \
        --scopes=https://www.googleapis.com/auth/cloud-platform
    wait_until_active
}

do_install() {
    local archive="${TMPDIR:-/tmp}/$NAME.tar.gz"
    if [ -z "$dry_run" ]; then
        tar -czf "$archive" --exclude=__pycache__ -C "$root" \
            align_jax configs experiments setup.py pyproject.toml README.md
    fi
    queued_resources scp "$archive" "$NAME:align_jax.tar.gz" "${where[@]:1}" "${everywhere[@]}"
    # The images' own Python is 3.10, older than align_jax takes.
    on_hosts 'set -e
mkdir -p align_jax
tar -xzf align_jax.tar.gz -C align_jax
python3 -m pip install --quiet --user uv
[ -d align_jax/.venv ] || ~/.local/bin/uv venv --quiet --python 3.12 align_jax/.venv
~/.local/bin/uv pip install --quiet --python align_jax/.venv/bin/python \
    --editable "./align_jax[tpu]"'
    [ -n "$BUCKET" ] || return 0
    on_hosts 'set -e
command -v gcsfuse >/dev/null && exit
packages=https://packages.cloud.google.com/apt
key=/usr/share/keyrings/cloud.google.asc
curl -fsSL $packages/doc/apt-key.gpg | sudo tee $key >/dev/null
echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list
sudo apt-get -qq update
sudo apt-get -qq install -y gcsfuse'
}

do_run() {
    # Mounted here, not at installation: a host that restarted has lost it.
    [ -z "$BUCKET" ] || on_hosts "set -e
mountpoint -q /mnt/gcs && exit
sudo mkdir -p /mnt/gcs
sudo chown \"\$USER\" /mnt/gcs
gcsfuse --implicit-dirs$(quote "$BUCKET") /mnt/gcs"
    on_hosts "$ALIVE"'
if alive; then echo "a run is alive here: $(cat ~/align.pid)"; exit; fi
cd ~/align_jax || exit
nohup .venv/bin/align'"$(quote "$@")"' >>~/align.log 2>&1 </dev/null &
echo $! >~/align.pid'
}

do_logs() {
    # Process 0, the only one that reports steps, is on the first host of the first slice.
    queued_resources ssh "${where[@]}" --node=0 --worker=0 --command='tail -n 100 -F ~/align.log'
}

do_status() {
    slice_state
    on_hosts "$ALIVE"'
alive && state=alive || state="no run"
echo "$(hostname): $state; $(tail -n 1 ~/align.log 2>/dev/null)"'
}

do_stop() {
    on_hosts "$ALIVE"'
alive || exit 0
kill -TERM "$(cat ~/align.pid)"
while alive; do sleep 1; done'
}

do_resume() {
    local state
    state="$(slice_state)"
    [ -z "$dry_run" ] || state=SUSPENDED # shows the longest way
    case $state in
        "" | SUSPEND* | FAILED)
            [ -z "$state" ] || do_delete
            do_create
            do_install
            ;;
        ACTIVE) ;;
        *)
            wait_until_active
            do_install
            ;;
    esac
    do_run "$@"
}

do_delete() {
    queued_resources delete "${where[@]}" --force --quiet
}

# Remote shell function: whether the run that was started last is still there.
ALIVE='alive() { grep -qas bin/align "/proc/$(cat ~/align.pid 2>/dev/null)/cmdline"; }'

wait_until_active() {
    local state
    while true; do
        state="$(slice_state)"
        [ -z "$dry_run" ] || return 0
        case $state in
            ACTIVE) return ;;
            "" | SUSPEND* | FAILED) die "$NAME is ${state:-not there}; delete it and create it anew." ;;
        esac
        echo "$NAME: $state"
        sleep "${POLL_S:-30}"
    done
}

# Prints nothing where there is no such queued resource.
slice_state() {
    queued_resources describe "${where[@]}" --format='value(state.state)' 2>/dev/null || true
}

on_hosts() {
    queued_resources ssh "${where[@]}" "${everywhere[@]}" --command="$1"
}

queued_resources() {
    if [ -n "$dry_run" ]; then
        echo "gcloud compute tpus queued-resources$(quote "$@")" >&3
    else
        gcloud compute tpus queued-resources "$@"
    fi
}

# Prints the words so that a shell reads them as they are, each after a space.
quote() {
    local word
    for word; do
        case $word in
            "" | *[!A-Za-z0-9_./:=,+%@-]*)
                printf " '%s'" "$(printf %s "$word" | sed "s/'/'\\\\''/g")"
                ;;
            *) printf ' %s' "$word" ;;
        esac
    done
}

die() {
    echo "tpu_vm.sh: $1" >&2
    exit 2
}

exec 3>&1 # dry runs print here, also from within $(...)
main "$@"
