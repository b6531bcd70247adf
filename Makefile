# The two commands: `make run` and `make test`. Each installs what it misses and can be repeated.

PREFIX ?= /usr/local
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
BINARY := $(TARGET)/release/strongroom
ROOT = $(DESTDIR)$(PREFIX)

.PHONY: help run build virtual-card test lint bench bench-agents soak install uninstall

help:
	@echo 'make run      build Strongroom, start it, and print the line that points ssh and git at it'
	@echo 'make test     install what the tests need, and run them all'
	@echo 'make lint     rustfmt, clippy, cargo-deny, rustdoc, shellcheck'
	@echo 'make bench    measure what bad devices cost everybody else, how fast tokens and cards are, and other agents'
	@echo 'make soak     crash, damage, time and simulate for as long as SOAK_CYCLES, STORE_ROUNDS, STORE_CRASHES,'
	@echo '              SOAK_SAMPLES and SIM_SEEDS say'
	@echo 'make install  install into PREFIX ($(PREFIX)), below DESTDIR where that is set'

run:
	@scripts/run

build:
	$(CARGO) build --release --locked

# The OpenPGP card of the tests: a package of its own, which is never installed.
virtual-card:
	$(CARGO) build --locked --manifest-path tests/virtual-card/Cargo.toml --target-dir $(TARGET)/virtual-card

test:
	@scripts/test

lint:
	@scripts/lint

# Beside devices that fail on command, which no release can have: a profile of their own.
BENCH = $(CARGO) bench --locked --profile bench-scripted

bench:
	$(BENCH) --bench isolation
	$(BENCH) --bench event_loop
	$(BENCH) --bench pkcs11
	$(BENCH) --bench store
	$(MAKE) virtual-card
	$(BENCH) --bench cards
	$(MAKE) bench-agents

# The table of docs/performance/agents.md, with its picture.
ROUNDS ?= 5

bench-agents: build
	STRONGROOM_RELEASE=$(abspath $(BINARY)) $(BENCH) --bench agents -- $(ROUNDS) --write $(CURDIR)/docs/performance

SOAK_CYCLES ?= 10000
SOAK_SAMPLES ?= 200000
SIM_SEEDS ?= 1000000
STORE_ROUNDS ?= 5000
STORE_CRASHES ?= 1000

soak:
	$(BENCH) --bench restarts -- $(SOAK_CYCLES)
	$(BENCH) --bench pkcs1_timing -- $(SOAK_SAMPLES)
	STORE_ROUNDS=$(STORE_ROUNDS) $(CARGO) test --locked --profile bench-scripted --test store_faults -- --nocapture
	STORE_ROUNDS=$(STORE_ROUNDS) $(CARGO) test --locked --profile bench-scripted --lib store::tests::damage -- --nocapture
	STORE_CRASHES=$(STORE_CRASHES) $(CARGO) test --locked --profile bench-scripted --test store_crash -- --nocapture
	SIM_SEEDS=$(SIM_SEEDS) $(CARGO) test --locked --profile bench-scripted --test simulation more_seeds_hold

# Run `make build` first, as yourself; then `make install`, as root.
install:
	@[ -x $(BINARY) ] || { echo '$(BINARY) is not built yet: run make build first.' >&2; exit 1; }
	install -D -m 755 $(BINARY) $(ROOT)/bin/strongroom
	install -d $(ROOT)/libexec/strongroom $(ROOT)/share/man/man1
	ln -sf ../../bin/strongroom $(ROOT)/libexec/strongroom/ssh-agent
	$(BINARY) man $(ROOT)/share/man/man1
	install -d $(ROOT)/share/bash-completion/completions $(ROOT)/share/zsh/site-functions
	install -d $(ROOT)/share/fish/vendor_completions.d
	$(BINARY) completions bash > $(ROOT)/share/bash-completion/completions/strongroom
	$(BINARY) completions zsh > $(ROOT)/share/zsh/site-functions/_strongroom
	$(BINARY) completions fish > $(ROOT)/share/fish/vendor_completions.d/strongroom.fish
	install -D -m 644 -t $(ROOT)/lib/systemd/user contrib/systemd/user/*.service contrib/systemd/user/*.socket
	install -D -m 644 -t $(ROOT)/lib/systemd/system contrib/systemd/system/*.service contrib/systemd/system/*.socket
	install -D -m 644 contrib/systemd/system/sysusers.conf $(ROOT)/lib/sysusers.d/strongroom.conf
	install -D -m 644 -t $(ROOT)/share/doc/strongroom/examples contrib/config.toml contrib/environment.d/*
	install -D -m 644 -t $(ROOT)/share/man/man1 contrib/man/*.1
	sed -i 's|^ExecStart=strongroom |ExecStart=$(PREFIX)/bin/strongroom |' \
		$(ROOT)/lib/systemd/user/strongroom*.service $(ROOT)/lib/systemd/system/strongroom*.service

uninstall:
	rm -rf $(ROOT)/libexec/strongroom $(ROOT)/share/doc/strongroom
	rm -f $(ROOT)/bin/strongroom $(ROOT)/share/man/man1/strongroom.1 $(ROOT)/share/man/man1/strongroom-*.1
	rm -f $(ROOT)/share/bash-completion/completions/strongroom $(ROOT)/share/zsh/site-functions/_strongroom
	rm -f $(ROOT)/share/fish/vendor_completions.d/strongroom.fish $(ROOT)/lib/sysusers.d/strongroom.conf
	rm -f $(ROOT)/lib/systemd/user/strongroom*.service $(ROOT)/lib/systemd/user/strongroom*.socket
	rm -f $(ROOT)/lib/systemd/system/strongroom*.service $(ROOT)/lib/systemd/system/strongroom*.socket
