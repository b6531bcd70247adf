#!/bin/bash
# Runs the tests for agents out of OpenSSH's own regression suite, as Debian packages it, against any ssh-agent.
#
#   tests/openssh_regress.sh AGENT [TEST...]
#
# Runs as root; the tests themselves run as an ordinary user, who may use sudo for as long as they run: they start sshd
# as root, call ssh-add as "nobody" and give the agent to root. Each test works on a copy of the suite and of AGENT.
# A test that skips itself has failed: it was meant to run.
#
#   REGRESS_USER  that user's name, created when missing     (sshregress)
#   REGRESS_TMO   seconds for one test                       (300)
#   REGRESS_JOBS  tests at a time                            (1)
#   REGRESS_HIDE  key types to leave out, as a regular expression: ssh-dss
#   REGRESS_KEEP  when set, the working directory stays
#   SSH_SK_HELPER, SSH_PKCS11_HELPER  are handed to the agent
#
# Prints `ok TEST` or `FAILED TEST` for each, then `N passed, N failed`. Exits 0 when all passed, 1 when one did not,
# 2 when it cannot run.
set -u

SUITE=/usr/lib/openssh/regress
USER_NAME=${REGRESS_USER:-sshregress}
SECONDS_EACH=${REGRESS_TMO:-300}
JOBS=${REGRESS_JOBS:-1}

stop() {
	echo "$1" >&2
	exit 2
}

[ $# -ge 1 ] || stop "usage: $0 AGENT [TEST...]"
AGENT=$(readlink -f -- "$1")
if [ ! -f "$AGENT" ] || [ ! -x "$AGENT" ]; then stop "not a program: $1"; fi
shift
[ $# -gt 0 ] || set -- agent agent-timeout agent-subprocess agent-getpeereid agent-ptrace agent-restrict \
	agent-pkcs11 hostkey-agent cert-file sshsig
[ "$(id -u)" = 0 ] || stop "run this as root"
for file in $SUITE/test-exec.sh /usr/sbin/sshd /usr/bin/{ssh-add,sudo,gdb,perl,openssl,softhsm2-util}; do
	[ -e "$file" ] || stop "$file is missing: apt-get install openssh-tests openssh-server openssh-client sudo gdb perl openssl softhsm2"
done

id "$USER_NAME" >/dev/null 2>&1 || useradd --system --create-home --shell /bin/sh "$USER_NAME" ||
	stop "cannot create the user $USER_NAME"
# Without PAM, sshd takes an account whose password starts with an exclamation mark for a locked one.
case $(getent shadow "$USER_NAME" | cut -d: -f2) in '!'*) usermod -p '*' "$USER_NAME" ;; esac
# The suite keeps files in that user's home, so only one run at a time; the lock ends with this shell.
exec 9>"/run/lock/openssh-regress-$USER_NAME.lock" || stop "cannot make the lock"
flock 9 || stop "cannot take the lock"
mkdir -p /run/sshd && chmod 755 /run/sshd

# The tests filter their configuration by words: this path must contain no hostkey, hostname, identityfile, pidfile
# nor proxycommand.
WORK=$(mktemp -d /tmp/sshregress.XXXXXX) || exit 2
chmod 711 "$WORK"
touch "$WORK/started"
SUDOERS=/etc/sudoers.d/zz-${WORK##*.}
echo "$USER_NAME ALL=(ALL) NOPASSWD:ALL" >"$SUDOERS" && chmod 440 "$SUDOERS"

# Ends agents that a test left behind: whatever runs from a copy below $1.
end_agents() {
	local process
	for process in /proc/[0-9]*; do
		case $(readlink "$process/exe" 2>/dev/null) in
		"$1"/*) kill "${process#/proc/}" 2>/dev/null ;;
		esac
	done
}

cleanup() {
	end_agents "$WORK"
	# Socket directories and login notes that agents and sshds leave when they are killed.
	find /tmp -maxdepth 1 -user "$USER_NAME" -newer "$WORK/started" \
		\( -type d -name 'ssh-??????????*' -o -type f -name 'sshauth.*' \) -exec rm -rf {} + 2>/dev/null
	rm -f "$SUDOERS"
	if [ -n "${REGRESS_KEEP:-}" ]; then echo "kept: $WORK"; else rm -rf "$WORK"; fi
}
trap cleanup EXIT
trap 'exit 2' HUP INT TERM

# The suite loops over what `ssh -Q key` names; a wrapper hides what is not to be tested.
SSH=/usr/bin/ssh
if [ -n "${REGRESS_HIDE:-}" ]; then
	SSH=$WORK/wrapped/ssh
	mkdir -m 755 "$WORK/wrapped"
	cat >"$SSH" <<-END
		#!/bin/sh
		case "\$1 \$2" in
		-Q*) /usr/bin/ssh "\$@" | grep -Ev '$REGRESS_HIDE' ;;
		-E*' -Q') shift; /usr/bin/ssh "\$@" | grep -Ev '$REGRESS_HIDE' ;;
		*) exec /usr/bin/ssh "\$@" ;;
		esac
	END
	chmod 755 "$SSH"
fi

# agent-subprocess passes when the agent never ran: so see first that it serves a command and hands on its status.
serves_a_command() {
	# shellcheck disable=SC2016 # the agent's shell is the one to expand this
	timeout 20 runuser -u "$USER_NAME" -- "$1" sh -c \
		'[ -S "$SSH_AUTH_SOCK" ] && kill -0 "$SSH_AGENT_PID" && { ssh-add -l; [ $? = 1 ]; } && exit 37' \
		>/dev/null 2>&1 9>&-
	[ $? = 37 ]
}

# Runs the test $1 in the directory $2 with sshd on port $3.
run_suite() {
	# SUDO must be this bare word for agent-getpeereid.
	# shellcheck disable=SC2016 # expanded by the shell that runs the test
	timeout -k 10 "$SECONDS_EACH" runuser -u "$USER_NAME" -- env -i \
		HOME="/home/$USER_NAME" USER="$USER_NAME" LOGNAME="$USER_NAME" SHELL=/bin/sh LC_ALL=C \
		PATH="$WORK/wrapped:/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin" \
		${SSH_SK_HELPER:+SSH_SK_HELPER="$SSH_SK_HELPER"} \
		${SSH_PKCS11_HELPER:+SSH_PKCS11_HELPER="$SSH_PKCS11_HELPER"} \
		SUDO=sudo TEST_SHELL=sh BUILDDIR="$2" TEST_SSH_PORT="$3" TEST_SSH_UNSAFE_PERMISSIONS=1 \
		TEST_SSH_SSH="$SSH" TEST_SSH_SSHAGENT="$2/bin/ssh-agent" \
		TEST_SSH_SFTPSERVER=/usr/lib/openssh/sftp-server \
		sh -c 'cd "$1" && exec sh ./test-exec.sh "$1" "$1/$2.sh"' sh "$2" "$1" \
		>"$2/out" 2>&1 </dev/null 9>&-
}

# Runs the test $1 as number $2, and prints its line.
run_test() {
	local test=$1 dir=$WORK/t$2 start=$SECONDS code why=
	if [ ! -f "$SUITE/$test.sh" ]; then
		echo "FAILED $test: there is no such test"
		return
	fi
	cp -a "$SUITE" "$dir" && mkdir "$dir/bin" && install -m 755 "$AGENT" "$dir/bin/ssh-agent" || return
	chown -R "$USER_NAME:" "$dir"

	if [ "$test" = agent-subprocess ] && ! serves_a_command "$dir/bin/ssh-agent"; then
		why="the agent does not run a command"
	else
		run_suite "$test" "$dir" $((PORT + $2))
		code=$?
		if [ $code = 124 ] || [ $code = 137 ]; then
			why="not done after $SECONDS_EACH s"
		elif [ $code != 0 ]; then
			why=$(grep -hm1 -E '^(FAIL|FATAL): ' "$dir/failed-regress.log" 2>/dev/null || grep -v '^$' "$dir/out" | tail -n 1)
			why=${why:-exit $code}
		elif grep -qi '^skipped' "$dir/out"; then
			why=$(grep -im1 '^skipped' "$dir/out")
		elif ! grep -q '^ok ' "$dir/out"; then
			why="it does not say ok"
		fi
	fi
	end_agents "$dir"
	if [ -z "$why" ]; then
		echo "ok $test ($((SECONDS - start)) s)"
	else
		echo "FAILED $test ($((SECONDS - start)) s): ${why:0:160}"
	fi
}

# sshd of most tests speaks over a pipe; the few that listen do so here.
PORT=$((20000 + $$ % 20000))
number=0
for test; do
	number=$((number + 1))
	while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done
	run_test "$test" $number >"$WORK/result.$number" &
done
wait
for ((i = 1; i <= number; i++)); do cat "$WORK/result.$i"; done
passed=$(cat "$WORK"/result.* | grep -c '^ok ')
echo "$passed passed, $((number - passed)) failed"
[ "$passed" = "$number" ]
