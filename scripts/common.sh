# What the scripts share. To be sourced by bash, from the repository's top directory.
# shellcheck shell=bash

# What `cargo build` calls.
# shellcheck disable=SC2034 # the scripts that source this use it
BUILD_PACKAGES=(gcc libc6-dev libpcsclite-dev make pkg-config)
# What building tests/virtual-card calls besides.
# shellcheck disable=SC2034
CARD_PACKAGES=(clang libclang-dev)

say() { echo "$*" >&2; }

die() {
	say "error: $1"
	shift
	[ $# -eq 0 ] || say "  $*"
	exit 1
}

as_root() {
	if [ "$(id -u)" = 0 ]; then "$@"; else sudo -- "$@"; fi
}

# Installs those of the named Debian packages that are missing.
need_packages() {
	local package missing=()
	for package; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
	done
	[ ${#missing[@]} -eq 0 ] && return
	local remedy="Install them as root: apt-get install ${missing[*]}"
	command -v apt-get >/dev/null || die "these packages are missing: ${missing[*]}" \
		"This is not Debian: install what they contain with your system's package manager."
	[ "$(id -u)" = 0 ] || command -v sudo >/dev/null || die "these packages are missing: ${missing[*]}" "$remedy"
	say "installing ${missing[*]}"
	local log
	log=$(mktemp)
	if ! { as_root apt-get update -qq &&
		as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
	} >"$log" 2>&1 </dev/null; then
		tail -n 5 "$log" >&2
		rm -f "$log"
		die "apt-get could not install ${missing[*]}" "$remedy"
	fi
	rm -f "$log"
}

# Checks that there is a Rust that can build this.
need_rust() {
	local wanted have
	[ -x "$(command -v cargo)" ] || PATH=$PATH:$HOME/.cargo/bin
	command -v cargo >/dev/null || die "there is no cargo here" \
		"Install Rust with rustup (https://rustup.rs), open a new shell, and try again."
	wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
	have=$(rustc --version 2>/dev/null | cut -d' ' -f2)
	[ -n "$have" ] || die "cargo is here, but rustc does not run" "Choose a toolchain: rustup default stable"
	[ "$(printf '%s\n' "$wanted" "$have" | sort -V | head -n 1)" = "$wanted" ] ||
		die "Rust $have is too old: this needs $wanted" "Update it: rustup update stable"
}

# Installs a cargo subcommand that is missing.
need_cargo_tool() {
	command -v "$1" >/dev/null && return
	say "installing $1"
	cargo install --locked --quiet "$1" || die "cargo could not install $1" "Install it by hand: cargo install --locked $1"
}
