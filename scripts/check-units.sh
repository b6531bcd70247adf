#!/bin/sh
# Checks the systemd units: their syntax, and how much they leave open. Needs no running systemd and no installed
# strongroom. Without systemd-analyze it says so and succeeds, unless STRICT=1.
set -eu
cd "$(dirname "$0")/../contrib/systemd"

if ! command -v systemd-analyze >/dev/null; then
    echo "check-units: systemd-analyze is missing; install the package systemd to check the units" >&2
    [ "${STRICT:-0}" = 0 ] && exit 0 || exit 1
fi

# The highest exposure level of each service, times ten. A user service cannot have what needs a namespace.
MAX_SYSTEM=10
MAX_USER=70

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0

for manager in user system; do
    mkdir "$scratch/$manager"
    # verify wants ExecStart= to exist, and the units are checked before anything is installed.
    for unit in "$manager"/*.socket "$manager"/*.service; do
        sed 's|^ExecStart=strongroom |ExecStart=/bin/true |' "$unit" >"$scratch/$unit"
    done
    cd "$scratch/$manager"
    # In systemd 252 verify warns of an unknown setting and still exits 0: any line is an error here.
    output=$(XDG_RUNTIME_DIR="$scratch" systemd-analyze --"$manager" --man=no verify ./*.socket ./*.service 2>&1) || failed=1
    if [ -n "$output" ]; then
        printf 'check-units: %s units:\n%s\n' "$manager" "$output" >&2
        failed=1
    fi
    cd - >/dev/null
done

security() { # manager, highest exposure
    report=$(XDG_RUNTIME_DIR="$scratch" systemd-analyze --"$1" --no-pager security --offline=true --threshold="$2" \
        "$scratch/$1/strongroom.service" 2>&1) || {
        printf '%s\n' "$report" >&2
        echo "check-units: the $1 service leaves too much open (limit $2, ten times the level); close it again" >&2
        failed=1
    }
    echo "$1: $(printf '%s\n' "$report" | tail -n 1)"
}
security system "$MAX_SYSTEM"
security user "$MAX_USER"
exit "$failed"
