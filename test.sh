#!/bin/sh
#
# test.sh: the tests of proxy.  Needs sh, cc and the standard utilities.
#
#   sh test.sh [-v] [name ...]     all tests, or those whose names contain one
#                                  of the words; -v shows what failed ones left
#   sh test.sh fuzz SECONDS [entry ...]
#                                  random input for parsers: see fuzz_entries
#   sh test.sh model               the whole proxy with every split of every
#                                  message of a small grammar: see write_model
#   sh test.sh faults [n [scenario ...]]
#                                  system calls that fail: see write_faults
#   sh test.sh soak SECONDS        many clients of all kinds at the same time
#   sh test.sh coverage [name ...] the tests, and which lines of proxy.c they
#                                  do not run: fails unless over 93 % are
#   sh test.sh bench               what the proxy costs beside other proxies
#   CC, CFLAGS                     how proxy.c is built for the tests
#   PROXY                          a binary to test instead
#   JOBS                           how many tests run at once (8)
#   TIMES                          a file for how long each test took: MS NAME
#                                  PLAYS
#   EMULATOR                       what runs programs of CC, if that is a cross
#                                  compiler, as in  EMULATOR=qemu-arm \
#                                  CC=arm-linux-gnueabihf-gcc CFLAGS=-static
#
# Each test is a shell function  test_NAME() { # what it shows  and runs in a
# subshell and a directory of its own ($T).  It passes if it comes to its end,
# and it ends early by fail or skip.  What it has started in its directory is
# ended with it; what does not end fails it.  The output is one line a test:
#
#   ok 7 - NAME: description
#   not ok 7 - NAME: why
#   ok 7 - NAME # SKIP why
#
# To add a test, write a function test_SUBJECT_PROMISE (forward_get, limit_heads)
# into the part of the section that keeps it, and what it promises behind its
# brace: its line in the output.  If another test has the same set-up, add a play
# (== TITLE) or rows to that one.  What needs no socket is a row: `rows' (rules and
# parsers, see there), `tries' (-T), `wrong' and `right' (lines of rules); all else
# is a play: one line for each thing that must be seen, one with !~ for each that
# must not.  No check may depend on speed; a step that waits for another side says
# so (touch and await).  Break the promise in proxy.c and see the test fail, mend
# it and run  sh test.sh SUBJECT_PROMISE  again, then  shellcheck test.sh.
#
# Most tests are plays.  A play is one client's connection to the proxy, the
# connections that reach the origin, and what everyone must see:
#
#   play 'what it shows' <<'END'
#   reply  200 Cache-Control: max-age=9\nETag: "a" | hello
#   ask    / X-A: b = 200 OK; hit | hello
#   sees   Via: 1.1 proxy-ID       the client gets this line ...
#   sees+  Content-Length: 5       ... and this one right behind it,
#   sees!~ ^Connection:            and nowhere one that matches this ERE
#   gets   GET / HTTP/1.1          what the origin gets
#   log    "GET http://%O/ HTTP/1.1" 200 5 .* end=done
#   == the next                    another play, with an origin of its own
#   alice: ask / = 502 error=connection_terminated
#   alice: sees!~ ^Age             a client with a name, in the background
#   do     comes asked             a shell command in between
#   END
#
# reply is what the origin answers to one request: STATUS [REASON\n] [FIELDS]
# [| BODY].  One with Connection: close is the last over its connection; what
# follows is for the next one.  ask is one request with its answer: [METHOD]
# URL [FIELDS] [| BODY] [= STATUS; CACHE-STATUS | BODY], where the URL of a
# path alone is the origin's.  Behind = is what must be seen: the status line,
# in full or (200) its beginning as an ERE, error= of Proxy-Status, cut if the
# answer ends too early, the beginning of Cache-Status, and the body as one line;
# what is not said may be anything.  All else is steps:
# "origin STEP ; STEP", "origin next" for the next connection, "client STEP";
# see peer.c below.  \n is CR LF.
#
# %O is the origin's address and port, %p its port alone, %P the proxy's
# address.  A line of checks is a tag, an operator and text:
#
#   sees gets err    = (or nothing) this line, after those matched before;
#   log              ~ the same by an ERE (log: always); + and +~ the very next
#                    line; ! and !~ no such line at all; # N exactly N lines
#                    that match the ERE (#N outside of plays)
#
# What is seen is made readable first: CR LF ends a line, other control bytes
# are escaped, and what changes from run to run is replaced: proxy-ID, [DATE],
# total=N.  "-- connection 2" begins what came over the origin's second
# connection, "-- end eof" (reset, open: our side closed) says how one ended.
# After each play a plain request must be served, but not after play -n.
#
# Parts A to E are what tests are made of.  Parts 1 to 29 have the numbers and
# titles of the sections of proxy.c; 30 to 36 look at the file as a whole, at
# real programs, speed, all splits, random input, faults, and coverage; 37 runs
# them.
#
# Helpers that several parts use, each with a comment where it is; those of one
# part stand there, before the first test that has them:
#
#   fail skip                      end the test
#   play touch                     see above; the latter without a process
#   start_proxy stop_proxy served  a proxy, its end, is it well
#   surrounded quick our_names logger      another build: short limits, our
#                                  names, syslog
#   start_names start_ruled start_rules    with names of ours, with rules
#   limited                        with so little memory
#   start_with                     with a parent
#   origin plain_origin load_origin nobody dead_port deaf echoes twins    servers
#   client client_bg many          clients beside a play
#   asks want gives reread         one request; its status; after HUP
#   exits says run_proxy tries     what a proxy says at once
#   has lacks counts ascii log_is_sound    what stands in a file
#   seen got logged said last_line untouched    what sides and log have seen
#   comes ended ends closed wait_for wait_exit ended_well    waiting
#   refused refused_get each       requests that get an error; many of a kind
#   wrong right check_rules        lines of rules
#   people basic login             users
#   need_me need_second_loopback have_ipv6 address_here second_address sanitized have
#                                  what the machine has, or skip
#   hello eicar_text kept_back     a TLS greeting, a text to look for
#   workers only_worker all_go page metric         processes of -j, and what they count
#   start_cache entries nothing_stored nothing_left asked    with a cache
#   spawn pipe_open each_line patience             processes, pipes, lines, longer waits
#   private_memory need_memory processor_time rests        what the proxy takes
#   need_calls count_calls calls   its system calls
#   need_source built built_once linked unit rows    C programs around proxy.c,
#                                  tables of rows

# shellcheck disable=SC2015,SC2016 # "A && B || fail" is meant, and wait_for
# evaluates a condition that is quoted for that
set -u
LC_ALL=C
export LC_ALL
unset http_proxy https_proxy HTTPS_PROXY all_proxy no_proxy NO_COLOR PEER_MS \
    PEER_FROM PEER_NOTES NAMES NAME_ADDRESSES

here=$(cd "$(dirname "$0")" && pwd)
self=$here/$(basename "$0")
cc=${CC:-cc}
cflags=${CFLAGS-"-O1"}
verbose=0
if [ "${1-}" = -v ]; then
	verbose=1
	shift
fi

# ---- A. Harness -------------------------------------------------------------

# Ends the test as failed.
fail() {
	[ -f "$T/.fail" ] || printf '%s\n' "$*" | tr '\n' ' ' > "$T/.fail"
	exit 1
}

# Ends the test as skipped.
skip() {
	printf '%s\n' "$*" > "$T/.skip"
	exit 0
}

# What most tests want of it, without a process.
touch() {
	case $1 in
	-*) command touch "$@" ;;
	*) for touch_file; do : >> "$touch_file"; done ;;
	esac
}

have() {
	command -v "$1" > /dev/null 2>&1
}

# Runs a command in the background until the test ends: spawn OUT CMD...
spawn() {
	spawn_out=$1
	shift
	"$@" > "$T/$spawn_out" 2>&1 &
	spawned=$!
	echo "$spawned" >> "$T/.pids"
}

# Polls until a shell condition holds, less often after a while:
# wait_for SECONDS 'condition'
# What is left is in $1, as a condition may wait for something itself.
wait_for() {
	set -- $(($1 * 1000)) "$2" 50
	until eval "$2"; do
		[ "$1" -gt 0 ] || return 1
		"$peer" sleep "$3"
		set -- $(($1 - $3)) "$2" $(($3 < 250 ? $3 + 50 : 250))
	done
}

# Waits for a child, kills it after so many seconds: wait_exit PID SECONDS
wait_exit() {
	"$peer" watch "$2"000 "$1" &
	wait "$1"
	wait_status=$?
	return "$wait_status"
}

# Waits until there are these files, which steps touch: comes FILE...
comes() {
	"$peer" await 20000 "$@" > .awaited ||
		fail "${what-${play_title-}}: no $(cat .awaited)"
}

# Starts $proxy_bin and waits for its banner.  Sets $proxy_pid and $proxy, the
# first address it listens on.  Its log is $T/log, its standard error $T/err;
# with name=x in front x.log and x.err, for a second proxy in a test.
start_proxy() {
	start_name=${name-}
	start_log=$T/${start_name:+$start_name.}log
	start_err=$T/${start_name:+$start_name.}err
	case " $* " in
	*" -l "*) ;;
	*) set -- -l 127.0.0.1:0 "$@" ;;
	esac
	# Here, not by the child alone: an older banner must not be taken for its.
	: > "$start_err"
	${proxy_wrap-} "$proxy_bin" "$@" >> "$start_log" 2> "$start_err" &
	proxy_pid=$!
	echo "$proxy_pid" >> "$T/.proxies"
	# Not as $(...): to wait here is what tells that it has ended.
	"$peer" banner "$start_err" "$proxy_pid" > "$T/banner" ||
		fail "proxy $* does not start: $(tail -n 1 "$start_err")"
	read -r proxy < "$T/banner"
}

# Ends the proxy with TERM; it must exit 0 within ten seconds.
stop_proxy() {
	kill -TERM "$proxy_pid" || fail "the proxy is gone"
	wait_exit "$proxy_pid" 10 || fail "on TERM the proxy exits $?"
	stop_others=
	while read -r stop_pid; do
		[ "$stop_pid" = "$proxy_pid" ] || stop_others="$stop_others$stop_pid
"
	done < "$T/.proxies"
	printf %s "$stop_others" > "$T/.proxies"
	proxy_pid=
	proxy=
}

# Opens a pipe that nobody reads, as descriptor 9: pipe_open NAME
pipe_open() {
	have mkfifo || skip "no mkfifo"
	mkfifo "$1" || skip "mkfifo cannot"
	exec 9<> "$1"
}

# A file has bytes of readable ASCII only.
ascii() {
	tr -d '\n\040-\176' < "$1" > odd
	[ ! -s odd ] || fail "${play_title-} $1 has bytes outside 32..126"
}

# So has the log, and all its lines are complete.
log_is_sound() {
	ascii log
	while read -r line; do
		case $line in
		'127.0.0.1 - '*' ['*'] "'*'" '[1-5][0-9][0-9]' '*' end='*) ;;
		*) fail "log line: $line" ;;
		esac
	done < log
}

# The proxy accepts nobody any more.
closed() {
	wait_for 3 '"$peer" client "$proxy" late < /dev/null
		grep refused late.end > /dev/null' || fail "still listening"
}

# It has been told to end, and does so within SECONDS: ended_well SECONDS
ended_well() {
	wait_exit "$proxy_pid" "$1" || fail "exit status $?"
	proxy_pid=
}

# The proxy of this test is one with short time limits, in milliseconds; a loaded
# machine must manage a request in the shortest of them.
quick() {
	surrounded
	export HEAD_MS=1000 CONNECT_MS=1500 HALF_CLOSED_MS=1000 \
	    KEPT_CLIENT_MS=1000 KEPT_SERVER_MS=1000 LINGER_MS=1000 \
	    LINGER_ALL_MS=2000 DRAIN_MS=1000 LISTEN_RETRY_MS=700
}

# Runs the proxy to its end, for what it says at once: sets $status, files
# $T/out and $T/errors.
run_proxy() {
	"$peer" run 10000 "$proxy_bin" "$@" > "$T/out" 2> "$T/errors" < /dev/null
	status=$?
}

# The same; it must exit so: exits STATUS OPTION...
exits() {
	exits_want=$1
	shift
	run_proxy "$@"
	[ $status = "$exits_want" ] || fail "proxy $*: exit status $status, not" \
	    "$exits_want; says: $(head -c 300 errors)"
}

# The same for each row on standard input, STATUS OPTION... [= BRE], with the
# quotes of the shell; standard error must have a line that matches the BRE.
says() {
	while IFS= read -r says_row; do
		eval "exits ${says_row%% = *}"
		[ "${says_row#* = }" = "$says_row" ] || has errors "${says_row#* = }"
	done
}

# A file has a line that matches the BRE, now or within so many seconds (5: what
# the proxy writes last may come after what a client sees), or has none:
# has FILE BRE [SECONDS], lacks FILE BRE
has() {
	"$peer" lines $((${3:-5} * 1000)) + "$1" "$2" || fail "${play_title-}" \
	    "$1 should have $2; has: $(head -c 600 "$1" | tr '\n' '|')"
}

lacks() {
	"$peer" lines 0 0 "$1" "$2" ||
		fail "${play_title-} $1 has $(grep -e "$2" "$1" | head -n 1)"
}

# So many of its lines match the BRE, now or within so many seconds (5):
# counts N FILE BRE [SECONDS]
counts() {
	"$peer" lines $((${4:-5} * 1000)) "$1" "$2" "$3" || fail "${play_title-} $2 should" \
	    "have $3 in $1 lines, not $(grep -c -e "$3" "$2"); has:" \
	    "$(head -c 600 "$2" | tr '\n' '|')"
}

# Lines with ` | ' in them become two.
each_line() {
	awk '{ n = split($0, part, / [|] /)
	for (i = 1; i <= n; i++)
		print part[i] }'
}

# At the end of a test: ends what it started, looks for crashes and for what does
# not end.
reap() {
	trap '' HUP INT TERM
	"$peer" reap "$T" "$T"/*err > "$T/.crash" &
	reap_peer=$!
	while read -r reap_pid; do
		wait "$reap_pid"
		reap_status=$?
		# 127: the test has waited for it.
		case $reap_status in
		0 | 127 | 143) ;;
		*) (fail "the proxy ends with status $reap_status") ;;
		esac
	done < "$T/.proxies"
	wait $reap_peer
	[ ! -s "$T/.crash" ] || (fail "$(cat "$T/.crash")")
}

# Runs one test and leaves its result line in $work/t.NAME/.result.
run_test() {
	T=$work/t.$1
	proxy=
	proxy_pid=
	plays=0
	[ -z "${TIMES-}" ] || run_began=$("$peer" clock)
	(
		cd "$T" || exit 1
		touch .pids .proxies
		trap reap EXIT
		trap 'exit 1' HUP INT TERM
		"test_$1"
		exit 0
	) > "$T/.out" 2>&1 < /dev/null
	run_status=$?
	if [ -f "$T/.fail" ]; then
		run_line="not ok - $1: $(cat "$T/.fail")"
	elif [ "$run_status" != 0 ]; then
		run_line="not ok - $1: stopped with status $run_status"
	elif [ -f "$T/.skip" ]; then
		run_line="ok - $1 # SKIP $(cat "$T/.skip")"
	else
		run_line="ok - $1: $2"
	fi
	printf '%s\n' "$run_line" > "$T/.result"
	[ -z "${TIMES-}" ] || echo "$(($("$peer" clock) - run_began)) $1 $plays" >> "$TIMES"
}

# ---- B. The other ends: clients and servers ---------------------------------

write_peer() {
	cat > "$work/peer.c" <<'EOF_PEER'
/*
 * peer: the other ends of a proxy under test.  A connection plays a script of
 * steps, each in a line or with " ; " before it; the origin plays one for each connection it accepts, the
 * client plays one on the connection it makes.  All that arrives is kept in
 * the file NAME (origin: NAME.1, NAME.2 ...), how it ended in NAME.end.
 *
 * send TEXT        \n is CR LF; \l LF, \r CR, \0, \t, \s blank, \\, \xHH;
 *                  \{N:TEXT} is TEXT N times
 * chop N MS TEXT   send N bytes at a time, MS milliseconds apart
 * fill N           send N bytes of a known pattern
 * skip N           read N bytes of that pattern, compare, do not keep
 * swap N           fill N and skip N at the same time
 * stuff N          send the pattern as long as it is taken, N bytes at most;
 *                  stop when nothing moved for a second; count to NAME.stuffed
 * until TEXT       read until TEXT has come (after what was read before)
 * head             until \n\n; at the end of the stream the script is over
 * want N           read N bytes more
 * answer [head]    read one whole HTTP response, 1xx too; head: without body
 * ask [1.0|here] [METHOD] URL [FIELDS] [| BODY]
 *                  send a request, of GET if no METHOD is said, and read its
 *                  answer; a URL of a path alone is the origin's.  Fields are
 *                  separated by \n, with one at their end or not; Host is
 *                  there, with a BODY its length.  1.0: such a request,
 *                  without Host, and eof; here: of a page of the proxy's own
 * say STATUS [REASON\n] [FIELDS] [| BODY]
 *                  send an answer: with the length of the BODY, if the fields
 *                  have neither that nor a Transfer-Encoding; without one the
 *                  head alone
 * reply ..., replies ...   head, then say ...; the same, and loop
 * eof              read to the end of the stream
 * quiet MS         nothing may come for so long
 * stall MS         do nothing for so long
 * shut, close, reset   half-close; close; close with a TCP reset
 * dial, over N     go on over another connection, or the N-th (from 1 on) of
 *                  this client; the one before stays open
 * touch FILE, await FILE   tell other processes, wait for them
 * loop             from the first step again
 *
 * Other modes are described where they are, and these:
 *
 * flood WHERE MS
 *     clients that are refused and go on sending as fast as they can, while
 *     others come and go
 * slow
 *     an origin with small windows that reads some of a request, then resets
 *     or answers 413 early; says PORT PID
 * upload N WHERE TEXT MS
 *     N clients send the head TEXT and chunks of all sizes for
 *     so long, and stay until they are closed
 * serve FILE
 *     writes its port to FILE and serves in this directory until it is killed:
 *     WebSocket echo; GET /wait, answered once a WebSocket said "done"; /git/ by
 *     git http-backend; any other body is kept in ./body and counted in the
 *     answer
 * load FILE
 *     writes its port to FILE and answers GET .../N with N bytes, kept alive,
 *     until it is killed. What is below /keep/ may be cached; how often it
 *     was asked for that is a long in FILE.asked.
 * measure [-c] [-d HOST] [-n] [-k N] [-r] [-x PROXY-PORT] [-z DIGITS]
 *     PORT CONNS REQUESTS MS SIZE
 *     asks that origin for SIZE bytes over CONNS connections at once, until
 *     REQUESTS are answered or MS have passed; -n: a new connection for each,
 *     -c: by CONNECT, -d: by this name for it, which the proxy must know how to
 *     reach, -k: for one of N objects that may be cached, in turn or (-r) at
 *     random, -z: with zeros in front of SIZE. Prints requests, seconds,
 *     errors (also a size that is not SIZE), its own microseconds of
 *     processor time, and the microseconds that 99 % of the responses took
 *     at most.
 * relay FILE PORT
 *     writes its port to FILE, connects each client to PORT, and copies bytes
 *     until it is killed: what a proxy can't do without
 * idle PROXY-PORT PORT CONNS FILE
 *     opens CONNS tunnels, writes how many stand to FILE, and keeps them
 *     until it is killed
 */
#define _XOPEN_SOURCE 700
#include <sys/mman.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <netdb.h>
#include <poll.h>
#include <regex.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

enum { CONNS_MAX = 12000, SCRIPTS_MAX = 64, PATTERN_PART = 65536,
	PATTERN_REPEATS = 26 * 4099 };

#define WELL "/well"	/* asked for by judge_served() */

struct text {
	char *bytes;
	size_t len;
};

/* One connection and what has come over it. */
struct talk {
	int fd;		/* -1 after close */
	int keep;	/* file for all that arrives */
	char *in;	/* the same in memory */
	size_t len;	/* bytes in it */
	size_t size;	/* its room */
	size_t used;	/* how far the steps have read */
	size_t sent_pattern, read_pattern;	/* positions in the pattern */
	int eof;	/* 1 end of stream, 2 reset */
	char end[400];	/* why the script stopped, empty: it ran through */
	const char *name;
};

static long patience_ms = 15000;	/* a step may wait so long */
static const char *origin_at = "";	/* whose paths a client asks for */
static const char *port_at = "";	/* the port of origin_at */
static const char *proxy_at;		/* whom it asks */
static const char *client_at;		/* where it connects to */
static int dialled[CONNS_MAX];		/* its connections, in their order */
static size_t dialled_n;

static void
die(const char *what)
{
	fprintf(stderr, "peer: %s: %s\n", what, strerror(errno));
	exit(1);
}

static long
now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (long)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void
sleep_ms(long ms)
{
	struct timespec t;

	t.tv_sec = ms / 1000;
	t.tv_nsec = ms % 1000 * 1000000;
	while (nanosleep(&t, &t) == -1 && errno == EINTR)
		;
}

static void *
grow(void *p, size_t n)
{
	p = realloc(p, n);
	if (p == NULL)
		die("memory");
	return p;
}

/* Room for n bytes and a NUL, so that appending seldom moves what is there. */
static size_t
text_room(size_t n)
{
	size_t room = 64;

	while (room <= n)
		room *= 2;
	return room;
}

static void
text_add(struct text *t, const char *bytes, size_t n)
{
	if (t->bytes == NULL || text_room(t->len) != text_room(t->len + n))
		t->bytes = grow(t->bytes, text_room(t->len + n));
	memcpy(t->bytes + t->len, bytes, n);
	t->len += n;
	t->bytes[t->len] = '\0';
}

/* Appends so many copies, for which there is room: twice as many at a time. */
static void
text_repeat(struct text *t, const struct text *once, unsigned long times)
{
	char *to = t->bytes + t->len;
	size_t all = times * once->len, done = 0, n = once->len;

	for (; done < all; done += n, n = done < all - done ? done : all - done)
		memcpy(to + done, done == 0 ? once->bytes : to, n);
	t->len += all;
	t->bytes[t->len] = '\0';
}

/* Appends s[0..n) with its escapes replaced. */
static void
text_unescape(struct text *t, const char *s, size_t n)
{
	static const char from[] = "nlr0ts\\";
	static const char *const to[] = { "\r\n", "\n", "\r", "", "\t", " ",
	    "\\" };
	size_t i;

	for (i = 0; i < n; i++) {
		const char *f;

		if (s[i] != '\\' || i + 1 == n) {
			text_add(t, s + i, 1);
			continue;
		}
		i++;
		f = strchr(from, s[i]);
		if (s[i] == 'x' && i + 2 < n) {
			char hex[3], c;

			hex[0] = s[i + 1];
			hex[1] = s[i + 2];
			hex[2] = '\0';
			c = (char)strtoul(hex, NULL, 16);
			text_add(t, &c, 1);
			i += 2;
		} else if (s[i] == '{') {
			char *p;
			unsigned long times = strtoul(s + i + 1, &p, 10);
			const char *close = strchr(p, '}');
			struct text once = { NULL, 0 };

			if (*p != ':' || close == NULL) {
				fprintf(stderr, "peer: bad \\{N:TEXT}\n");
				exit(1);
			}
			text_unescape(&once, p + 1, (size_t)(close - p - 1));
			t->bytes = grow(t->bytes,
			    text_room(t->len + times * once.len));
			text_repeat(t, &once, times);
			free(once.bytes);
			i = (size_t)(close - s);
		} else if (f != NULL && *f != '\0') {
			text_add(t, to[f - from], *f == '0' ? 1 :
			    strlen(to[f - from]));
		} else {
			fprintf(stderr, "peer: bad escape \\%c\n", s[i]);
			exit(1);
		}
	}
}

/* s[0..n) with its escapes replaced. */
static struct text
unescaped(const char *s, size_t n)
{
	struct text t = { NULL, 0 };

	text_add(&t, "", 0);
	text_unescape(&t, s, n);
	return t;
}

static void
text_format(struct text *t, const char *format, ...)
{
	char line[4096];
	va_list ap;

	va_start(ap, format);
	vsnprintf(line, sizeof(line), format, ap);
	va_end(ap);
	text_add(t, line, strlen(line));
}

/* The pattern from position i on, PATTERN_PART bytes of it. */
static const char *
pattern(size_t i)
{
	static char bytes[PATTERN_REPEATS + PATTERN_PART];
	size_t n;

	for (n = 0; bytes[sizeof(bytes) - 1] == '\0'; n++)
		bytes[n] = (char)('a' + (n % 26 + n / 4099) % 26);
	return bytes + i % PATTERN_REPEATS;
}

static void
stop(struct talk *t, const char *what, const char *step)
{
	if (t->end[0] == '\0')
		snprintf(t->end, sizeof(t->end), "%s%s%s", what,
		    *step == '\0' ? "" : " ", step);
}

/* Waits for the events; false when time is up. */
static int
ready(struct talk *t, short events, long deadline)
{
	struct pollfd p;
	long left = deadline - now_ms();

	p.fd = t->fd;
	p.events = events;
	return poll(&p, 1, left > 0 ? (int)left : 0) > 0;
}

/* The same; then the step has failed. */
static int
await_events(struct talk *t, short events, long deadline, const char *step)
{
	if (ready(t, events, deadline))
		return 1;
	stop(t, "timeout", step);
	return 0;
}

/* Reads once into memory; false at the end of the stream. */
static int
take_some(struct talk *t)
{
	ssize_t n;

	if (t->size - t->len < 16384)
		t->in = grow(t->in, t->size *= 2);
	n = recv(t->fd, t->in + t->len, t->size - t->len, 0);
	if (n > 0) {
		if (t->keep != -1 &&
		    write(t->keep, t->in + t->len, (size_t)n) != n)
			die("keep");
		t->len += (size_t)n;
		return 1;
	}
	if (n == -1 && (errno == EAGAIN || errno == EINTR))
		return 1;
	t->eof = n == 0 ? 1 : 2;
	return 0;
}

/* Reads until more than have bytes are there; false: end or time is up. */
static int
more(struct talk *t, size_t have, long deadline, const char *step)
{
	while (t->len <= have) {
		if (t->eof) {
			stop(t, t->eof == 1 ? "eof" : "reset", step);
			return 0;
		}
		if (!await_events(t, POLLIN, deadline, step))
			return 0;
		(void)take_some(t);
	}
	return 1;
}

static size_t
find(const char *in, size_t len, const char *what, size_t n)
{
	size_t i;

	for (i = 0; i + n <= len; i++)
		if (memcmp(in + i, what, n) == 0)
			return i + n;
	return 0;
}

/* Reads up to and with what; returns the bytes this took, 0 if it failed. */
static size_t
read_until(struct talk *t, const char *what, size_t n, const char *step)
{
	long deadline = now_ms() + patience_ms;
	size_t begin = t->used, from = begin, end;

	while ((end = find(t->in + from, t->len - from, what, n)) == 0) {
		if (t->len >= from + n)		/* has been looked at */
			from = t->len - n + 1;
		if (!more(t, t->len, deadline, step))
			return 0;
	}
	t->used = from + end;
	return t->used - begin;
}

static void
read_bytes(struct talk *t, size_t n, const char *step)
{
	long deadline = now_ms() + patience_ms;

	if (n > 0 && more(t, t->used + n - 1, deadline, step))
		t->used += n;
}

static void
read_to_eof(struct talk *t, const char *step)
{
	long deadline = now_ms() + patience_ms;

	while (!t->eof) {
		if (!await_events(t, POLLIN, deadline, step))
			return;
		(void)take_some(t);
	}
	t->used = t->len;
}

/* Finds the value of a field in a head; NULL if there is none. */
static const char *
field(const char *head, size_t len, const char *name)
{
	size_t i, n = strlen(name);

	for (i = 0; i + n + 2 < len; i++)
		if (head[i] == '\n' && strncasecmp(head + i + 1, name, n) == 0
		    && head[i + 1 + n] == ':') {
			i += n + 2;
			while (head[i] == ' ')
				i++;
			return head + i;
		}
	return NULL;
}

static void
read_chunks(struct talk *t, const char *step)
{
	for (;;) {
		size_t start = t->used, n;

		if (read_until(t, "\r\n", 2, step) == 0)
			return;
		n = (size_t)strtoul(t->in + start, NULL, 16);
		if (n == 0)
			break;
		read_bytes(t, n + 2, step);
		if (t->end[0] != '\0')
			return;
	}
	while (read_until(t, "\r\n", 2, step) > 2)
		;
}

/*
 * Reads one whole response, its interim responses before it.  To some methods
 * it has no body.
 */
static void
read_answer(struct talk *t, const char *method, const char *step)
{
	for (;;) {
		size_t start = t->used, n;
		const char *v;
		int status;

		n = read_until(t, "\r\n\r\n", 4, step);
		if (n == 0)
			return;
		status = n > 12 ? atoi(t->in + start + 9) : 0;
		if (status / 100 == 1 && status != 101)
			continue;
		if (strcmp(method, "HEAD") == 0 || status == 204 ||
		    status == 304 || status == 101 ||
		    (strcmp(method, "CONNECT") == 0 && status / 100 == 2))
			return;
		v = field(t->in + start, n, "Transfer-Encoding");
		if (v != NULL) {
			read_chunks(t, step);
			return;
		}
		v = field(t->in + start, n, "Content-Length");
		if (v != NULL)
			read_bytes(t, (size_t)strtoul(v, NULL, 10), step);
		else
			read_to_eof(t, step);
		return;
	}
}

/* Sends n bytes, step by step if piece is not 0. */
static void
send_bytes(struct talk *t, const char *p, size_t n, size_t piece, long ms,
    const char *step)
{
	long deadline = now_ms() + patience_ms;

	while (n > 0) {
		size_t part = piece > 0 && piece < n ? piece : n;
		ssize_t done = send(t->fd, p, part, MSG_NOSIGNAL);

		if (done == -1 && (errno == EAGAIN || errno == EINTR)) {
			if (!await_events(t, POLLOUT, deadline, step))
				return;
			continue;
		}
		if (done == -1) {
			stop(t, "broken", step);
			return;
		}
		p += done;
		n -= (size_t)done;
		if (ms > 0 && n > 0)
			sleep_ms(ms);
	}
}

/* Sends some of the pattern, to its position end at most; false: broken. */
static int
push_pattern(struct talk *t, size_t end)
{
	size_t n = end - t->sent_pattern;
	ssize_t done = send(t->fd, pattern(t->sent_pattern), n > 16384 ? 16384 :
	    n, MSG_NOSIGNAL);

	if (done == -1)
		return errno == EAGAIN || errno == EINTR;
	t->sent_pattern += (size_t)done;
	return 1;
}

/* Takes some of the pattern off, to its position end at most. */
static int
pull_pattern(struct talk *t, size_t end, const char *step)
{
	static char block[PATTERN_PART];
	size_t want = end - t->read_pattern, n = t->len - t->used;
	ssize_t got;

	if (n > 0) {			/* came with an earlier read */
		n = n > sizeof(block) ? sizeof(block) : n;
		n = n > want ? want : n;
		memcpy(block, t->in + t->used, n);
		t->used += n;
	} else {
		got = recv(t->fd, block, want > sizeof(block) ?
		    sizeof(block) : want, 0);
		if (got == -1 && (errno == EAGAIN || errno == EINTR))
			return 1;
		if (got <= 0) {
			t->eof = got == 0 ? 1 : 2;
			stop(t, got == 0 ? "eof" : "reset", step);
			return 0;
		}
		n = (size_t)got;
	}
	if (memcmp(block, pattern(t->read_pattern), n) != 0) {
		stop(t, "differs", step);
		return 0;
	}
	t->read_pattern += n;
	return 1;
}

/* Sends up and takes down bytes of the pattern, both at once. */
static void
move_pattern(struct talk *t, size_t up, size_t down, const char *step)
{
	long deadline = now_ms() + patience_ms;

	up += t->sent_pattern;
	down += t->read_pattern;
	while (t->sent_pattern < up || t->read_pattern < down) {
		short events = 0;

		if (t->sent_pattern < up)
			events |= POLLOUT;
		if (t->read_pattern < down)
			events |= POLLIN;
		if ((t->len == t->used || t->read_pattern == down) &&
		    !await_events(t, events, deadline, step))
			return;
		if (t->sent_pattern < up && !push_pattern(t, up)) {
			stop(t, "broken", step);
			return;
		}
		if (t->read_pattern < down && !pull_pattern(t, down, step))
			return;
		deadline = now_ms() + patience_ms;
	}
}

/* Sends as much as the other side's lack of reading allows. */
static void
stuff(struct talk *t, size_t n)
{
	char name[300];
	FILE *f;

	n += t->sent_pattern;
	while (t->sent_pattern < n &&
	    ready(t, POLLOUT, now_ms() + 1000) && push_pattern(t, n))
		;
	snprintf(name, sizeof(name), "%s.stuffed", t->name);
	if ((f = fopen(name, "w")) == NULL)
		die(name);
	fprintf(f, "%lu\n", (unsigned long)t->sent_pattern);
	fclose(f);
}

static void
await_file(struct talk *t, const char *file, const char *step)
{
	long deadline = now_ms() + patience_ms;
	struct stat st;

	while (stat(file, &st) == -1) {
		if (now_ms() > deadline) {
			stop(t, "timeout", step);
			return;
		}
		sleep_ms(10);
	}
}

static void
touch_file(const char *file)
{
	int fd = open(file, O_WRONLY | O_CREAT, 0600);

	if (fd == -1)
		die(file);
	close(fd);
}

static void
close_talk(struct talk *t, int reset)
{
	struct linger hard = { 1, 0 };
	size_t i;

	if (reset)
		setsockopt(t->fd, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
	close(t->fd);
	for (i = 0; i < dialled_n; i++)
		if (dialled[i] == t->fd)
			dialled[i] = -1;
	t->fd = -1;
}

static void
send_text(struct talk *t, const char *arg, size_t piece, long ms,
    const char *step)
{
	struct text text = unescaped(arg, strlen(arg));

	send_bytes(t, text.bytes, text.len, piece, ms, step);
	free(text.bytes);
}

/* Waits for something, then for the end of a head. */
static void
read_head(struct talk *t, const char *step)
{
	while (t->len == t->used && !t->eof)
		if (!ready(t, POLLIN, now_ms() + patience_ms) ||
		    !take_some(t))
			break;
	if (t->len == t->used && t->eof)
		stop(t, t->eof == 1 ? "eof" : "reset", "");
	else
		(void)read_until(t, "\r\n\r\n", 4, step);
}

/*
 * Sends a message: the first line, which ends where fields[0..n) begins, those
 * fields, and what stands in rest behind a bar, if anything does.
 */
static void
send_message(struct talk *t, struct text *head, const char *fields, size_t n,
    const char *rest, const char *step)
{
	struct text body = { NULL, 0 };

	text_unescape(head, fields, n);
	if (n > 0 && head->bytes[head->len - 1] != '\n')
		text_add(head, "\r\n", 2);
	if (*rest != '\0') {
		rest += strlen(" |") + (rest[2] == ' ');
		body = unescaped(rest, strlen(rest));
		if (field(head->bytes, head->len, "Content-Length") == NULL &&
		    field(head->bytes, head->len, "Transfer-Encoding") == NULL)
			text_format(head, "Content-Length: %lu\r\n",
			    (unsigned long)body.len);
	}
	text_add(head, "\r\n", 2);
	if (body.len > 0)
		text_add(head, body.bytes, body.len);
	send_bytes(t, head->bytes, head->len, 0, 0, step);
	free(body.bytes);
	free(head->bytes);
}

/* Where the bar before the body is, or the end. */
static const char *
bar(const char *s)
{
	size_t n = strlen(s);
	const char *at = strstr(s, " | ");

	return at != NULL ? at :
	    s + n - (n >= 2 && strcmp(s + n - 2, " |") == 0 ? 2 : 0);
}

static const char *
reason(int status)
{
	return status == 200 ? "OK" : status == 206 ? "Partial Content" :
	    status == 304 ? "Not Modified" : "X";
}

static void
say(struct talk *t, const char *arg, const char *step)
{
	struct text head = { NULL, 0 };
	const char *end = bar(arg), *s = arg + strcspn(arg, " "), *line, *colon;

	s = s < end ? s + 1 : end;
	text_format(&head, "HTTP/1.1 %.3s ", arg);
	/* What has no colon is no field but the reason. */
	line = strstr(s, "\\n");
	line = line == NULL || line > end ? end : line;
	colon = strchr(s, ':');
	if (s < end && (colon == NULL || colon > line)) {
		text_unescape(&head, s, (size_t)(line - s));
		s = line < end ? line + 2 : end;
	} else
		text_format(&head, "%s", reason(atoi(arg)));
	text_add(&head, "\r\n", 2);
	send_message(t, &head, s, (size_t)(end - s), end, step);
}

static void
ask(struct talk *t, const char *arg)
{
	struct text head = { NULL, 0 };
	const char *end = bar(arg), *url = arg, *host;
	char method[40] = "GET";
	int old = strncmp(arg, "1.0 ", 4) == 0;
	int here = strncmp(arg, "here ", 5) == 0;
	size_t n, h;

	url += old ? 4 : here ? 5 : 0;
	n = strcspn(url, " ");
	host = strstr(url, "://");
	if (*url != '/' && (host == NULL || host > url + n)) {
		snprintf(method, sizeof(method), "%.*s", (int)n, url);
		url += n + (url[n] == ' ');
		n = strcspn(url, " ");
		host = strstr(url, "://");
	}
	host = host == NULL || host > url + n ? url : host + 3;
	h = strcspn(host, "/? ");
	text_format(&head, "%s ", method);
	if (*url == '/') {
		host = here ? proxy_at : origin_at;
		h = strlen(host);
		text_format(&head, here ? "" : "http://%s", host);
	}
	text_unescape(&head, url, n);
	text_format(&head, old ? " HTTP/1.0\r\n" : " HTTP/1.1\r\nHost: ");
	if (!old) {
		text_unescape(&head, host, h);
		text_add(&head, "\r\n", 2);
	}
	url += n + (url + n < end);
	send_message(t, &head, url, (size_t)(end - url), end, "send");
	if (t->end[0] == '\0' && old)
		read_to_eof(t, "eof");
	else if (t->end[0] == '\0')
		read_answer(t, method, "answer");
	/* For who reads what came: the next answer begins a line. */
	if (t->keep != -1 && t->used == t->len && t->len > 0 &&
	    t->in[t->len - 1] != '\n' && write(t->keep, "\r\n", 2) != 2)
		die("keep");
}

/* The steps that read and judge; false if this is none of them. */
static int
step_reading(struct talk *t, const char *word, const char *arg, size_t n,
    const char *step)
{
	if (strcmp(word, "until") == 0) {
		struct text text = unescaped(arg, strlen(arg));

		(void)read_until(t, text.bytes, text.len, step);
		free(text.bytes);
	} else if (strcmp(word, "head") == 0)
		read_head(t, step);
	else if (strcmp(word, "ask") == 0)
		ask(t, arg);
	else if (strcmp(word, "reply") == 0 || strcmp(word, "replies") == 0) {
		read_head(t, step);
		if (t->end[0] == '\0')
			say(t, arg, step);
	} else if (strcmp(word, "say") == 0)
		say(t, arg, step);
	else if (strcmp(word, "want") == 0)
		read_bytes(t, n, step);
	else if (strcmp(word, "answer") == 0)
		read_answer(t, strcmp(arg, "head") == 0 ? "HEAD" : "", step);
	else if (strcmp(word, "eof") == 0)
		read_to_eof(t, step);
	else if (strcmp(word, "skip") == 0)
		move_pattern(t, 0, n, step);
	else if (strcmp(word, "swap") == 0)
		move_pattern(t, n, n, step);
	else if (strcmp(word, "quiet") == 0) {
		if (t->len > t->used ||
		    ready(t, POLLIN, now_ms() + (long)n))
			stop(t, "noise", step);
	} else
		return 0;
	return 1;
}

/* Binds to the IPv4 address $PEER_FROM, if it is set. */
static int
dial_from(int fd)
{
	struct sockaddr_in in;

	if (getenv("PEER_FROM") == NULL)
		return 0;
	memset(&in, 0, sizeof(in));
	in.sin_family = AF_INET;
	in.sin_addr.s_addr = inet_addr(getenv("PEER_FROM"));
	return bind(fd, (struct sockaddr *)&in, sizeof(in));
}

/* Connects to "/path", "host:port" or "[v6]:port"; numeric only. */
static int
dial(const char *where)
{
	struct addrinfo hints, *a;
	char host[256];
	const char *colon = strrchr(where, ':');
	size_t n;
	int fd;

	if (strchr(where, '/') != NULL) {
		struct sockaddr_un un;

		memset(&un, 0, sizeof(un));
		un.sun_family = AF_UNIX;
		snprintf(un.sun_path, sizeof(un.sun_path), "%s", where);
		fd = socket(AF_UNIX, SOCK_STREAM, 0);
		if (connect(fd, (struct sockaddr *)&un, sizeof(un)) == 0)
			return fd;
		close(fd);
		return -1;
	}
	if (colon == NULL || (n = (size_t)(colon - where)) >= sizeof(host))
		return -1;
	memcpy(host, where, n);
	host[n] = '\0';
	if (host[0] == '[') {
		memmove(host, host + 1, n);
		host[strcspn(host, "]")] = '\0';
	}
	memset(&hints, 0, sizeof(hints));
	hints.ai_socktype = SOCK_STREAM;
	hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
	if (getaddrinfo(host, colon + 1, &hints, &a) != 0)
		return -1;
	fd = socket(a->ai_family, SOCK_STREAM, 0);
	if (fd != -1 && ((a->ai_family == AF_INET && dial_from(fd) == -1) ||
		connect(fd, a->ai_addr, a->ai_addrlen) == -1)) {
		close(fd);
		fd = -1;
	}
	freeaddrinfo(a);
	return fd;
}

/* Goes on over the connection fd of the same client. */
static void
go_on(struct talk *t, int fd, const char *step)
{
	t->fd = fd;
	if (fd == -1)
		stop(t, "refused", step);
	else
		fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	t->eof = 0;
	t->used = t->len;
}

static void
dial_again(struct talk *t, const char *step)
{
	if (dialled_n == CONNS_MAX)
		die(step);
	go_on(t, dialled[dialled_n++] = dial(client_at), step);
}

/* The steps that send, wait or close. */
static void
step_other(struct talk *t, const char *word, const char *arg, size_t n,
    const char *step)
{
	if (strcmp(word, "send") == 0)
		send_text(t, arg, 0, 0, step);
	else if (strcmp(word, "chop") == 0) {
		char *p;
		long ms = (strtoul(arg, &p, 10), strtol(p, &p, 10));

		send_text(t, *p == ' ' ? p + 1 : p, n, ms, step);
	} else if (strcmp(word, "fill") == 0)
		move_pattern(t, n, 0, step);
	else if (strcmp(word, "stuff") == 0)
		stuff(t, n);
	else if (strcmp(word, "stall") == 0)
		sleep_ms((long)n);
	else if (strcmp(word, "shut") == 0)
		shutdown(t->fd, SHUT_WR);
	else if (strcmp(word, "close") == 0)
		close_talk(t, 0);
	else if (strcmp(word, "reset") == 0)
		close_talk(t, 1);
	else if (strcmp(word, "dial") == 0)
		dial_again(t, step);
	else if (strcmp(word, "over") == 0)
		go_on(t, n > 0 && n <= dialled_n ? dialled[n - 1] : -1, step);
	else if (strcmp(word, "touch") == 0)
		touch_file(arg);
	else if (strcmp(word, "await") == 0)
		await_file(t, arg, step);
	else {
		fprintf(stderr, "peer: no such step: %s\n", step);
		stop(t, "unknown", step);
	}
}

/* The length of the step that s begins with. */
static size_t
step_len(const char *s)
{
	const char *end = strstr(s, " ; ");
	size_t n = strcspn(s, "\n");

	return end != NULL && (size_t)(end - s) < n ? (size_t)(end - s) : n;
}

/* Plays a script. */
static void
play(struct talk *t, const char *script)
{
	const char *s = script;

	while (*(s += strspn(s, " \t")) != '\0' && t->end[0] == '\0') {
		size_t n = step_len(s);
		char *step = grow(NULL, n + 1), *word, *arg;

		memcpy(step, s, n);
		step[n] = '\0';
		s += n + (s[n] == ' ' ? strlen(" ; ") : s[n] == '\n');
		word = grow(NULL, n + 1);
		strcpy(word, step);
		arg = word + strcspn(word, " ");
		if (*arg != '\0')
			*arg++ = '\0';
		if (strcmp(word, "loop") == 0)
			s = script;
		else if (*word != '\0' && t->fd == -1 &&
		    strcmp(word, "touch") != 0 && strcmp(word, "await") != 0 &&
		    strcmp(word, "stall") != 0 && strcmp(word, "dial") != 0 &&
		    strcmp(word, "over") != 0)
			stop(t, "closed", step);
		else if (*word != '\0') {
			size_t num = (size_t)strtoul(arg, NULL, 10);

			if (!step_reading(t, word, arg, num, step))
				step_other(t, word, arg, num, step);
			if (strcmp(word, "replies") == 0)
				s = script;
		}
		free(step);
		free(word);
	}
}

static void
talk_begin(struct talk *t, int fd, const char *name)
{
	int on = 1;

	memset(t, 0, sizeof(*t));
	t->fd = fd;
	t->name = name;
	t->in = grow(NULL, t->size = 32768);
	t->keep = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600);
	if (t->keep == -1)
		die(name);
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

/* Writes how the talk ended, under a temporary name first. */
static void
talk_end(struct talk *t)
{
	char tmp[300], name[300];
	FILE *f;

	if (t->end[0] == '\0')
		snprintf(t->end, sizeof(t->end), "%s", t->eof == 1 ? "eof" :
		    t->eof == 2 ? "reset" : "open");
	snprintf(tmp, sizeof(tmp), "%s.end~", t->name);
	snprintf(name, sizeof(name), "%s.end", t->name);
	if ((f = fopen(tmp, "w")) == NULL)
		die(tmp);
	fprintf(f, "%s\n", t->end);
	fclose(f);
	rename(tmp, name);
}

/* Appends all that comes from a file; without stdio, which takes memory anew. */
static void
text_read(struct text *t, int fd)
{
	char block[65536];
	ssize_t n;

	text_add(t, "", 0);
	while ((n = read(fd, block, sizeof(block))) > 0)
		text_add(t, block, (size_t)n);
}

static char *
read_stdin(void)
{
	struct text t = { NULL, 0 };

	text_read(&t, STDIN_FILENO);
	return t.bytes;
}

/* Files of plays that no other process needs: they are not written. */
static struct kept {
	char name[60];
	struct text text;
} *kept;
static size_t kept_n;

static struct kept *
kept_file(const char *name)
{
	size_t i;

	for (i = 0; i < kept_n; i++)
		if (strcmp(kept[i].name, name) == 0)
			return &kept[i];
	return NULL;
}

static int
file_is_there(const char *name)
{
	struct stat st;

	return kept_file(name) != NULL || stat(name, &st) == 0;
}

/* Appends a file; false if there is none. */
static int
text_file(struct text *t, const char *name)
{
	struct kept *k = kept_file(name);
	int fd = k == NULL ? open(name, O_RDONLY) : -1;

	text_add(t, "", 0);
	if (k != NULL)
		text_add(t, k->text.bytes, k->text.len);
	if (fd == -1)
		return k != NULL;
	text_read(t, fd);
	close(fd);
	return 1;
}

/* s with addresses in the place of %O, %p and %P; the caller frees it. */
static char *
addressed(const char *s)
{
	struct text t = { NULL, 0 };

	text_add(&t, "", 0);
	while (*s != '\0') {
		size_t n = strcspn(s, "%");
		const char *with;

		text_add(&t, s, n);
		s += n;
		with = *s == '\0' ? NULL : s[1] == 'O' ? origin_at :
		    s[1] == 'p' ? port_at : s[1] == 'P' ? proxy_at : NULL;
		if (with != NULL) {
			text_add(&t, with, strlen(with));
			s += 2;
		} else if (*s != '\0')
			text_add(&t, s++, 1);
	}
	return t.bytes;
}

/* A socket with a numeric address and port; -1 and errno if it can't be had. */
static int
bound(const char *address, int port)
{
	struct addrinfo hints, *a;
	char service[16];
	int fd, on = 1, error;

	snprintf(service, sizeof(service), "%d", port);
	memset(&hints, 0, sizeof(hints));
	hints.ai_socktype = SOCK_STREAM;
	hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV | AI_PASSIVE;
	if (getaddrinfo(address, service, &hints, &a) != 0)
		return -1;
	fd = socket(a->ai_family, SOCK_STREAM, 0);
	if (fd != -1) {
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
		if (bind(fd, a->ai_addr, a->ai_addrlen) == -1) {
			error = errno;
			close(fd);
			errno = error;
			fd = -1;
		}
	}
	freeaddrinfo(a);
	return fd;
}

/*
 * A port that nobody has on any address, lest it be taken on the next one that a
 * test needs.  It is under those that the kernel gives to clients.
 */
static int
port_of_nobody(void)
{
	static const char *const any[] = { "0.0.0.0", "::" };
	static int tried;
	int port, fd, i;

	do {
		port = 10000 + (int)(getpid() % 2750 * 8 + tried) % 22000;
		for (i = 0; i < 2; i++) {
			fd = bound(any[i], port);
			if (fd == -1 && errno == EADDRINUSE)
				break;
			close(fd);
		}
	} while (++tried < 22000 && i < 2);
	return port;
}

/* Listens on a numeric address; sets *port, if it is 0. */
static int
hear(const char *address, int *port, int backlog)
{
	int fd;

	if (*port == 0)
		*port = port_of_nobody();
	fd = bound(address, *port);
	return fd != -1 && listen(fd, backlog) == 0 ? fd : -1;
}

/* Notes in NAME.peer where the connection comes from, if $PEER_NOTES is set. */
static void
note_peer(int fd, const char *name)
{
	struct sockaddr_storage s;
	socklen_t len = sizeof(s);
	char file[300], host[256];
	FILE *f;

	snprintf(file, sizeof(file), "%s.peer", name);
	if (getenv("PEER_NOTES") == NULL ||
	    getpeername(fd, (struct sockaddr *)&s, &len) == -1 ||
	    getnameinfo((struct sockaddr *)&s, len, host, sizeof(host), NULL, 0,
	    NI_NUMERICHOST) != 0 || (f = fopen(file, "w")) == NULL)
		return;
	fprintf(f, "%s\n", host);
	fclose(f);
}

/* One accepted connection: its script, then a polite end. */
static void
serve(int fd, const char *base, int number, const char *script)
{
	struct talk t;
	char name[256];

	snprintf(name, sizeof(name), "%s.%d", base, number);
	note_peer(fd, name);
	talk_begin(&t, fd, name);
	play(&t, script);
	if (t.fd != -1) {
		long deadline = now_ms() + 2000;

		shutdown(t.fd, SHUT_WR);
		while (!t.eof && ready(&t, POLLIN, deadline))
			(void)take_some(&t);
	}
	talk_end(&t);
	exit(0);
}

static void
end_group(int sig)
{
	(void)sig;
	kill(0, SIGKILL);
}

/*
 * Forks a process of its own group for the background, whose words go to
 * origins.err; returns its number, and 0 to itself.
 */
static pid_t
part(void)
{
	pid_t pid;
	int fd;

	fflush(stdout);
	pid = fork();
	if (pid == -1)
		die("fork");
	if (pid > 0)
		return pid;
	setsid();
	signal(SIGTERM, end_group);
	signal(SIGALRM, end_group);
	alarm(600);
	fd = open("origins.err", O_WRONLY | O_CREAT | O_APPEND, 0600);
	if (fd == -1)
		die("origins.err");
	dup2(fd, 1);
	dup2(fd, 2);
	fd = open("/dev/null", O_RDONLY);
	if (fd != -1)
		dup2(fd, 0);
	return 0;
}

/* Goes on in the background, and prints the port and the process. */
static void
detach(int port)
{
	pid_t pid = part();

	if (pid > 0) {
		printf("%d %ld\n", port, (long)pid);
		exit(0);
	}
}

/* Listens where -a ADDRESS and -p PORT say; sets *port, optind at NAME. */
static int
hear_where(int argc, char **argv, int *port, int backlog)
{
	const char *address = "127.0.0.1";
	int opt, fd;

	while ((opt = getopt(argc, argv, "a:p:")) != -1)
		if (opt == 'a')
			address = optarg;
		else if (opt == 'p')
			*port = atoi(optarg);
	if (optind + 1 != argc)
		return -1;
	fd = hear(address, port, backlog);
	if (fd == -1)
		die(address);
	return fd;
}

/* Serves whom fd accepts, each by the next of the scripts, which --- divides. */
static void
origin_serve(int fd, const char *name, char *all)
{
	const char *scripts[SCRIPTS_MAX];
	int n = 0, number = 0;
	char *p;

	scripts[n++] = all;
	for (p = all; (p = strstr(p, "---\n")) != NULL; )
		if (p == all || p[-1] == '\n') {
			*p = '\0';
			p += 4;
			if (n < SCRIPTS_MAX)
				scripts[n++] = p;
		} else
			p++;
	signal(SIGCHLD, SIG_IGN);
	for (;;) {
		int c = accept(fd, NULL, NULL);
		int k = number < n ? number : n - 1;

		if (c == -1)
			continue;
		number++;
		if (fork() == 0) {
			signal(SIGTERM, SIG_DFL);
			signal(SIGCHLD, SIG_DFL);
			close(fd);
			serve(c, name, number, scripts[k]);
		}
		close(c);
	}
}

/*
 * origin [-a ADDRESS] [-p PORT] NAME: a server in the background; prints its
 * port and its process.  Its scripts are on stdin.
 */
static int
main_origin(int argc, char **argv)
{
	int port = 0, fd = hear_where(argc, argv, &port, 128);
	char *all;

	if (fd == -1)
		return 2;
	all = read_stdin();
	detach(port);
	origin_serve(fd, argv[optind], all);
	return 0;
}

static void
raise_files(void)
{
	struct rlimit r;

	if (getrlimit(RLIMIT_NOFILE, &r) == 0) {
		r.rlim_cur = r.rlim_max;
		(void)setrlimit(RLIMIT_NOFILE, &r);
	}
}

/* Plays a client's script to whom is at `where`. */
static void
client_play(const char *where, const char *name, const char *script)
{
	struct talk t;
	char end[300];
	size_t i;
	int fd, error;

	snprintf(end, sizeof(end), "%s.end", name);
	(void)unlink(end);
	raise_files();
	client_at = where;
	fd = dialled[0] = dial(where);
	dialled_n = 1;
	error = errno;
	talk_begin(&t, fd, name);
	if (fd == -1)
		stop(&t, "refused", strerror(error));
	else
		play(&t, script);
	for (i = 0; i < dialled_n; i++)
		if (dialled[i] != -1)
			close(dialled[i]);
	talk_end(&t);
	free(t.in);
	close(t.keep);
}

/*
 * client WHERE NAME [ORIGIN [PORT PROXY]], script on stdin, with %O and so on
 * for these addresses
 */
static int
main_client(int argc, char **argv)
{
	char *script = read_stdin();

	if (argc < 3)
		return 2;
	proxy_at = argv[1];
	if (argc > 3)
		origin_at = argv[3];
	if (argc > 5) {
		port_at = argv[4];
		proxy_at = argv[5];
		script = addressed(script);
	}
	client_play(argv[1], argv[2], script);
	return 0;
}

/* echo: sends back what comes, on thousands of connections. */
static int
main_echo(int argc, char **argv)
{
	static struct pollfd fds[CONNS_MAX];
	static char block[65536];
	int port = 0, n = 1, i;

	(void)argc, (void)argv;
	raise_files();
	fds[0].fd = hear("127.0.0.1", &port, 1024);
	fds[0].events = POLLIN;
	if (fds[0].fd == -1 || fcntl(fds[0].fd, F_SETFL, O_NONBLOCK) == -1)
		die("echo");
	detach(port);
	for (;;) {
		if (poll(fds, (nfds_t)n, -1) == -1)
			continue;
		for (i = n - 1; i > 0; i--) {
			ssize_t got;

			if (fds[i].revents == 0)
				continue;
			got = recv(fds[i].fd, block, sizeof(block), 0);
			if (got <= 0 || send(fds[i].fd, block, (size_t)got,
			    MSG_NOSIGNAL) != got) {
				close(fds[i].fd);
				fds[i] = fds[--n];
			}
		}
		while (n < CONNS_MAX &&
		    (fds[n].fd = accept(fds[0].fd, NULL, NULL)) != -1)
			fds[n++].events = POLLIN;
	}
}

/* deaf [-a ADDRESS] [-p PORT] NAME: a port whose SYNs are not answered. */
static int
main_deaf(int argc, char **argv)
{
	struct sockaddr_storage s;
	socklen_t len = sizeof(s);
	int port = 0, fd = hear_where(argc, argv, &port, 0), i;

	if (getsockname(fd, (struct sockaddr *)&s, &len) == -1)
		die("name");
	for (i = 0; i < 8; i++) {
		struct pollfd p;
		int c = socket(s.ss_family, SOCK_STREAM, 0);

		fcntl(c, F_SETFL, O_NONBLOCK);
		if (connect(c, (struct sockaddr *)&s, len) == 0)
			continue;
		p.fd = c;
		p.events = POLLOUT;
		if (errno != EINPROGRESS)
			break;
		if (poll(&p, 1, 300) == 0) {
			detach(port);
			for (;;)
				pause();
		}
	}
	printf("no\n");
	return 1;
}

/* myself: an address of this machine that is not loopback's, if any. */
static int
main_myself(int argc, char **argv)
{
	struct sockaddr_in a;
	socklen_t len = sizeof(a);
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	(void)argc, (void)argv;
	memset(&a, 0, sizeof(a));
	a.sin_family = AF_INET;
	a.sin_port = htons(9);
	a.sin_addr.s_addr = htonl(0xc0000201);	/* sends nothing */
	if (connect(fd, (struct sockaddr *)&a, len) == -1 ||
	    getsockname(fd, (struct sockaddr *)&a, &len) == -1 ||
	    ntohl(a.sin_addr.s_addr) >> 24 == 127)
		return 1;
	printf("%s\n", inet_ntoa(a.sin_addr));
	return 0;
}

/* base64: of stdin. */
static int
main_base64(int argc, char **argv)
{
	static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	    "abcdefghijklmnopqrstuvwxyz0123456789+/";
	int n;
	unsigned char b[3];

	(void)argc, (void)argv;
	while ((n = (int)fread(b, 1, 3, stdin)) > 0) {
		b[1] = n > 1 ? b[1] : 0;
		b[2] = n > 2 ? b[2] : 0;
		putchar(digits[b[0] >> 2]);
		putchar(digits[(b[0] & 3) << 4 | b[1] >> 4]);
		putchar(n > 1 ? digits[(b[1] & 15) << 2 | b[2] >> 6] : '=');
		putchar(n > 2 ? digits[b[2] & 63] : '=');
	}
	putchar('\n');
	return 0;
}

/* Appends bytes as lines; CR LF ends one, all else unprintable is escaped. */
static void
text_show(struct text *t, const char *s, size_t n)
{
	size_t i = 0, run;

	while (i < n) {
		for (run = i; run < n && s[run] >= 32 && s[run] <= 126; run++)
			;
		text_add(t, s + i, run - i);
		if ((i = run) == n)
			break;
		if (s[i] == '\r' && i + 1 < n && s[i + 1] == '\n') {
			text_add(t, "\n", 1);
			i++;
		} else if (s[i] == '\r')
			text_add(t, "\\r", 2);
		else if (s[i] == '\n')
			text_add(t, "\\l\n", 3);
		else
			text_format(t, "\\x%02x", (unsigned char)s[i]);
		i++;
	}
}

/* show: stdin, as text_show() says */
static int
main_show(int argc, char **argv)
{
	struct text in = { NULL, 0 }, out = { NULL, 0 };

	(void)argc, (void)argv;
	text_read(&in, STDIN_FILENO);
	text_add(&out, "", 0);
	text_show(&out, in.bytes, in.len);
	return fwrite(out.bytes, 1, out.len, stdout) == out.len ? 0 : 1;
}

/* What changes from run to run, and what stands for it. */
static const char *const our_name[] = { "proxy-[0-9a-f]{8}", "proxy-ID", NULL };
static const char *const log_numbers[] = {
	"\\[[0-3][0-9]/[A-Z][a-z][a-z]/[0-9:]* [+-][0-9]*\\]", "[DATE]",
	" dns=[0-9]+ ", " dns=N ", " connect=[0-9]+ ", " connect=N ",
	" first=[0-9]+ ", " first=N ", " total=[0-9]+ ", " total=N ", NULL
};

/* Compiles an ERE, which must be one. */
static regex_t
expression(const char *ere)
{
	regex_t re;

	if (regcomp(&re, ere, REG_EXTENDED) != 0) {
		fprintf(stderr, "peer: bad expression: %s\n", ere);
		exit(2);
	}
	return re;
}

/* Replaces in t what the list of pairs says, which is compiled once. */
static void
text_replace(struct text *t, const char *const *pairs)
{
	static struct {
		const char *ere;
		regex_t re;
	} all[8], *known;

	for (; *pairs != NULL; pairs += 2) {
		struct text out = { NULL, 0 };
		const char *s = t->bytes;
		regmatch_t m;

		for (known = all; known->ere != NULL && known->ere != *pairs; )
			known++;
		if (known->ere == NULL) {
			known->ere = *pairs;
			known->re = expression(*pairs);
		}
		text_add(&out, "", 0);
		while (regexec(&known->re, s, 1, &m, 0) == 0) {
			text_add(&out, s, (size_t)m.rm_so);
			text_add(&out, pairs[1], strlen(pairs[1]));
			s += m.rm_eo;
		}
		text_add(&out, s, strlen(s));
		free(t->bytes);
		*t = out;
	}
}

/* What a connection has brought, and how it ended; nothing if it is not there. */
static void
show_talk(struct text *t, const char *name)
{
	struct text all = { NULL, 0 }, end = { NULL, 0 };
	size_t from = t->len;
	char file[300];

	if (text_file(&all, name)) {
		text_show(t, all.bytes, all.len);
		if (t->len > from && t->bytes[t->len - 1] != '\n')
			text_add(t, "\n", 1);
		snprintf(file, sizeof(file), "%s.end", name);
		if (text_file(&end, file)) {
			text_add(t, "-- end ", 7);
			text_add(t, end.bytes, end.len);
		}
	}
	free(all.bytes);
	free(end.bytes);
}

/* What there is to look at: set by options of "check" and "judge". */
static const char *title = "", *log_file = "log", *err_file = "err";
static size_t log_from = 1, err_from = 1;	/* lines, from 1 */
static int probes;	/* -w: the next request must be served, too */

/* Appends a file from a line on. */
static void
show_file(struct text *t, const char *name, size_t from)
{
	struct text all = { NULL, 0 };
	const char *s;

	(void)text_file(&all, name);
	for (s = all.bytes; from > 1 && *s != '\0'; from--)
		s += strcspn(s, "\n") + (s[strcspn(s, "\n")] != '\0');
	text_add(t, s, strlen(s));
	free(all.bytes);
}

/*
 * Takes out the lines of judge_served(): one that proved the proxy well before
 * may be logged after all that it was to be before.
 */
static void
drop_served(struct text *t)
{
	char *line = t->bytes, *end;

	for (; (end = strchr(line, '\n')) != NULL; line = end) {
		end++;
		if (find(line, (size_t)(end - line), WELL " HTTP/1.1\" 200 ",
		    strlen(WELL " HTTP/1.1\" 200 ")) == 0)
			continue;
		memmove(line, end, strlen(end) + 1);
		end = line;
	}
	t->len = strlen(t->bytes);
}

/*
 * What one side has seen.  The kind is "seen" (a client: names of talks),
 * "got" (an origin: its connections in their order), "log" or "err".
 */
static void
show(struct text *t, const char *kind, char *const *names, int n)
{
	char name[300];
	struct stat st;
	int i;

	text_add(t, "", 0);
	if (strcmp(kind, "log") == 0) {
		show_file(t, log_file, log_from);
		drop_served(t);
		text_replace(t, log_numbers);
		return;
	}
	if (strcmp(kind, "err") == 0)
		show_file(t, err_file, err_from);
	else if (strcmp(kind, "got") == 0)
		for (i = 1; ; i++) {
			snprintf(name, sizeof(name), "%s.%d", names[0], i);
			if (stat(name, &st) == -1)
				break;
			text_format(t, "-- connection %d\n", i);
			show_talk(t, name);
		}
	else
		for (i = 0; i < n; i++)
			show_talk(t, names[i]);
	text_replace(t, our_name);
}

/* Ends as failed; the test reads why in the file ".why". */
static void
failed(const char *format, ...)
{
	FILE *f = fopen(".why", "w");
	va_list ap;

	if (f == NULL)
		die(".why");
	fprintf(f, "%s%s", title, *title != '\0' ? ": " : "");
	va_start(ap, format);
	vfprintf(f, format, ap);
	va_end(ap);
	fclose(f);
	exit(1);
}

/* What stands in a text, in one line and cut short, for failed(). */
static const char *
gist(struct text *t)
{
	size_t i;

	if (t->len > 600)
		t->bytes[600] = '\0';
	for (i = 0; t->bytes[i] != '\0'; i++)
		if (t->bytes[i] == '\n')
			t->bytes[i] = '|';
	return t->bytes;
}

/* Cuts text into lines; returns how many there are. */
static size_t
cut_lines(char *text, char ***lines)
{
	size_t n = 0;
	char *s;

	*lines = NULL;
	for (s = text; *s != '\0'; n++) {
		*lines = grow(*lines, (n + 1) * sizeof(**lines));
		(*lines)[n] = s;
		s += strcspn(s, "\n");
		if (*s != '\0')
			*s++ = '\0';
	}
	return n;
}

/* A check "OPERATOR TEXT" of lines seen, of which *at have been matched. */
static int
check_holds(const char *check, char **seen, size_t lines, size_t *at)
{
	const char *text = check + strcspn(check, " ");
	int ere = check[0] == '#' || memchr(check, '~',
	    (size_t)(text - check)) != NULL;
	size_t i, hits = 0, from = strchr("#!", *check) != NULL ? 0 : *at;
	size_t to = *check == '+' && from < lines ? from + 1 : lines;
	regex_t re;

	text += *text == ' ';
	if (ere)
		re = expression(text);
	for (i = from; i < to; i++)
		if (ere ? regexec(&re, seen[i], 0, NULL, 0) == 0 :
		    strcmp(seen[i], text) == 0) {
			hits++;
			if (*check != '#')
				break;
		}
	if (ere)
		regfree(&re);
	if (*check == '#')
		return hits == (size_t)strtoul(check + 1, NULL, 10);
	if (*check == '!')
		return hits == 0;
	*at = i + 1;
	return hits > 0;
}

/* How many lines of a file match a BRE; -1: there is no such file. */
static long
lines_like(const char *file, const char *bre)
{
	struct text all = { NULL, 0 };
	char **line;
	size_t i, lines;
	long n = -1;
	regex_t re;

	if (regcomp(&re, bre, REG_NOSUB) != 0) {
		fprintf(stderr, "peer: bad expression: %s\n", bre);
		exit(2);
	}
	if (text_file(&all, file)) {
		for (i = 0; i < all.len; i++)
			if (all.bytes[i] == '\0')
				all.bytes[i] = '\1';
		lines = cut_lines(all.bytes, &line);
		for (i = 0, n = 0; i < lines; i++)
			n += regexec(&re, line[i], 0, NULL, 0) == 0;
		free(line);
	}
	regfree(&re);
	free(all.bytes);
	return n;
}

/*
 * lines MS N FILE BRE: 0 if N lines (+: any) match, now or within so many ms; a
 * file that is not there has none if MS is 0.
 */
static int
main_lines(int argc, char **argv)
{
	long until = now_ms() + (argc == 5 ? atol(argv[1]) : 0), n;

	if (argc != 5)
		return 2;
	for (;; sleep_ms(20)) {
		n = lines_like(argv[3], argv[4]);
		if (n == -1 && strcmp(argv[1], "0") == 0)
			n = 0;
		if (*argv[2] == '+' ? n > 0 : n == atol(argv[2]))
			return 0;
		if (now_ms() >= until)
			return 1;
	}
}

/* await MS FILE...: waits for all of them; prints the first that does not come. */
static int
main_await(int argc, char **argv)
{
	long until = now_ms() + (argc > 1 ? atol(argv[1]) : 0);
	struct stat st;
	int i;

	for (i = 2; i < argc; i++)
		while (stat(argv[i], &st) == -1) {
			if (now_ms() > until) {
				puts(argv[i]);
				return 1;
			}
			sleep_ms(10);
		}
	return 0;
}

/* Waits until the checks, one a line, hold of what is seen; see show(). */
static void
hold(const char *who, char *checks, const char *kind, char *const *names, int n)
{
	long began = now_ms();
	char **check, **line;
	size_t i, wait, at, lines, count;

	checks = addressed(checks);
	count = cut_lines(checks, &check);
	for (wait = 2; count > 0; wait = wait < 50 ? wait * 2 : 50) {
		struct text seen = { NULL, 0 }, copy = { NULL, 0 };

		show(&seen, kind, names, n);
		text_add(&copy, seen.bytes, seen.len);
		lines = cut_lines(copy.bytes, &line);
		for (i = at = 0; i < count; i++)
			if (!check_holds(check[i], line, lines, &at))
				break;
		free(copy.bytes);
		free(line);
		if (i == count)
			break;
		if (now_ms() - began > 15000)
			failed("%s should: %s; has: %s", who, check[i],
			    gist(&seen));
		free(seen.bytes);
		sleep_ms((long)wait);
	}
	free(checks);
	free(check);
}

/* The same, with checks of a file, if that is there. */
static char *
hold_file(const char *who, const char *file, const char *kind, const char *name)
{
	struct text checks = { NULL, 0 };
	char *names[1];

	names[0] = (char *)(size_t)name;
	(void)text_file(&checks, file);
	hold(who, checks.bytes, kind, names, 1);
	return checks.bytes;
}

/* How a talk ended, in one word and a step; NULL if it has not. */
static char *
ending(const char *name)
{
	struct text end = { NULL, 0 };
	char file[300];

	snprintf(file, sizeof(file), "%s.end", name);
	if (!text_file(&end, file))
		return NULL;
	end.bytes[strcspn(end.bytes, "\n")] = '\0';
	return end.bytes;
}

/* A client has come to its end, and has seen what it must. */
static void
judge_client(const char *name, const char *file)
{
	long deadline = now_ms() + 20000;
	struct text checks = { NULL, 0 }, seen = { NULL, 0 };
	char *end;

	while ((end = ending(name)) == NULL) {
		if (now_ms() > deadline)
			failed("%s does not end", name);
		sleep_ms(10);
	}
	/* A side that did not get what it waited for fails, unless expected. */
	(void)text_file(&checks, file);
	if (strstr(checks.bytes, "-- end") == NULL &&
	    strcmp(end, "eof") != 0 && strcmp(end, "reset") != 0 &&
	    strcmp(end, "open") != 0) {
		show_talk(&seen, name);
		failed("client: %s; has: %s", end, gist(&seen));
	}
	hold_file(name, file, "seen", name);
}

/* What the origin got, and that its scripts ran as they should. */
static void
judge_origin(const char *origin, const char *file)
{
	char *checks = hold_file(origin, file, "got", origin), *end, name[300];
	struct stat st;
	int i;

	if (strstr(checks, "-- end") != NULL)
		return;
	for (i = 1; ; i++) {
		snprintf(name, sizeof(name), "%s.%d", origin, i);
		if (stat(name, &st) == -1)
			return;
		end = ending(name);
		if (end != NULL && (strncmp(end, "eof ", 4) == 0 ||
		    strncmp(end, "reset ", 6) == 0 ||
		    strncmp(end, "timeout", 7) == 0 ||
		    strncmp(end, "differs", 7) == 0 ||
		    strncmp(end, "unknown", 7) == 0))
			failed("origin: %s", end);
	}
}

/* Answers the request that comes to fd, if it comes before the client has more. */
static void
serve_well(int fd, const struct talk *client)
{
	static const char answer[] = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n"
	    "Connection: close\r\n\r\nwell";
	struct pollfd p[2];
	struct talk t;

	p[0].fd = fd;
	p[1].fd = client->fd;
	p[0].events = p[1].events = POLLIN;
	if (poll(p, 2, (int)patience_ms) <= 0 || p[0].revents == 0)
		return;
	talk_begin(&t, accept(fd, NULL, NULL), "well");
	read_head(&t, "head");
	send_bytes(&t, answer, strlen(answer), 0, 0, "say");
	close(t.fd);
	close(t.keep);
	free(t.in);
}

/* The proxy serves a plain request, now. */
static void
judge_served(void)
{
	struct text head = { NULL, 0 };
	struct talk t;
	int port = 0, fd = dial(proxy_at), here = hear("127.0.0.1", &port, 8);

	talk_begin(&t, fd, "served");
	if (fd == -1 || here == -1)
		stop(&t, "refused", "");
	else {
		text_format(&head, "GET http://127.0.0.1:%d" WELL " HTTP/1.1\r\n"
		    "Host: 127.0.0.1:%d\r\n\r\n", port, port);
		send_bytes(&t, head.bytes, head.len, 0, 0, "send");
		serve_well(here, &t);
		read_answer(&t, "GET", "answer");
	}
	talk_end(&t);
	if (strcmp(t.end, "open") != 0 || find(t.in, t.len, "well", 4) == 0)
		failed("the next request is not served: %s %.*s", t.end,
		    t.len < 80 ? (int)t.len : 80, t.in);
	close(here);
	close(t.fd);
	close(t.keep);
	free(t.in);
	free(head.bytes);
}

/* Options of what there is to look at; returns the place behind them. */
static int
looking_at(int argc, char **argv)
{
	int opt;

	while ((opt = getopt(argc, argv, "t:o:p:x:l:L:e:E:w")) != -1)
		switch (opt) {
		case 't': title = optarg; break;
		case 'o': origin_at = optarg; break;
		case 'p': port_at = optarg; break;
		case 'x': proxy_at = optarg; break;
		case 'l': log_file = optarg; break;
		case 'L': log_from = (size_t)strtoul(optarg, NULL, 10); break;
		case 'e': err_file = optarg; break;
		case 'E': err_from = (size_t)strtoul(optarg, NULL, 10); break;
		case 'w': probes = 1; break;
		default: exit(2);
		}
	return optind;
}

/* check [OPTION ...] seen|got|log|err [NAME ...]: checks on stdin */
static int
main_check(int argc, char **argv)
{
	int i = looking_at(argc, argv);

	if (i == argc)
		return 2;
	hold(i + 1 < argc ? argv[i + 1] : argv[i], read_stdin(), argv[i],
	    argv + i + 1, argc - i - 1);
	return 0;
}

static size_t
file_lines(const char *name)
{
	struct text t = { NULL, 0 };
	size_t i, n = 0;

	(void)text_file(&t, name);
	for (i = 0; i < t.len; i++)
		n += t.bytes[i] == '\n';
	free(t.bytes);
	return n;
}

/* The last line of the log must match these, within 5 s. */
static void
hold_last(char *const *eres)
{
	for (; *eres != NULL; eres++) {
		regex_t re = expression(*eres);
		long until = now_ms() + 5000;

		for (;; sleep_ms(20)) {
			struct text all = { NULL, 0 };
			char **line;
			size_t n;

			(void)text_file(&all, log_file);
			n = cut_lines(all.bytes, &line);
			if (n > 0 && regexec(&re, line[n - 1], 0, NULL, 0) == 0)
				break;
			if (now_ms() > until)
				failed("the log should: %s; has: %s", *eres,
				    n > 0 ? line[n - 1] : "");
			free(line);
			free(all.bytes);
		}
		regfree(&re);
	}
}

/* last [OPTION ...] ERE... */
static int
main_last(int argc, char **argv)
{
	hold_last(argv + looking_at(argc, argv));
	return 0;
}

/*
 * want [OPTION ...] STATUS METHOD URL [FIELDS\n [ERE ...]]: one request, up to its
 * line in the log, if that comes; the answer is in the file a.  It must have this
 * status, unless that is -, and the last line of the log match the EREs.
 */
static int
main_want(int argc, char **argv)
{
	const char *at;
	int i = looking_at(argc, argv);
	struct text script = { NULL, 0 }, got = { NULL, 0 };
	size_t lines = file_lines(log_file), n;
	long until;

	if (argc - i < 3)
		return 2;
	text_format(&script, "send %s ", argv[i + 1]);
	text_add(&script, argv[i + 2], strlen(argv[i + 2]));
	text_format(&script, " HTTP/1.1\\nHost: x\\n");
	if (argc - i > 3)
		text_add(&script, argv[i + 3], strlen(argv[i + 3]));
	text_format(&script, "\\n ; answer%s",
	    strcmp(argv[i + 1], "CONNECT") == 0 ? " head" : "");
	client_play(proxy_at, "a", addressed(script.bytes));
	until = now_ms() + 2000;
	while (file_lines(log_file) == lines && now_ms() < until)
		sleep_ms(5);
	(void)text_file(&got, "a");
	n = strcspn(got.bytes, "\r\n");
	at = strncmp(got.bytes, "HTTP/1.1 ", 9) == 0 ? got.bytes + 9 : "";
	if (*argv[i] != '-' && (strncmp(at, argv[i], 3) != 0 || at[3] != ' '))
		failed("%s %s: %.*s, not %s", argv[i + 1], argv[i + 2], (int)n,
		    got.bytes, argv[i]);
	if (argc - i > 4)
		hold_last(argv + i + 4);
	return 0;
}

static long blocks;	/* of 512 bytes */
static ino_t counted[1 << 15];	/* by their numbers; 0: free */

/* What is renamed meanwhile may come twice. */
static int
blocks_add(const char *path, const struct stat *st, int kind, struct FTW *where)
{
	size_t size = sizeof(counted) / sizeof(counted[0]);
	size_t i = (size_t)st->st_ino % size;

	(void)path, (void)where;
	if (kind == FTW_NS)
		return 0;
	for (; counted[i] != 0; i = (i + 1) % size)
		if (counted[i] == st->st_ino)
			return 0;
	counted[i] = st->st_ino;
	blocks += (long)st->st_blocks;
	return 0;
}

/*
 * most DIRECTORY FILE: prints how many KiB of the disk the directory takes at
 * most, with all that is in it, until there is the file.
 */
static int
main_most(int argc, char **argv)
{
	long most = 0, until = now_ms() + 120000;
	int over;

	if (argc != 3)
		return 2;
	do {
		over = access(argv[2], F_OK) == 0 || now_ms() > until;
		blocks = 0;
		memset(counted, 0, sizeof(counted));
		(void)nftw(argv[1], blocks_add, 8, FTW_PHYS);
		most = blocks > most ? blocks : most;
		sleep_ms(10);
	} while (!over);
	printf("%ld\n", most / 2);
	return 0;
}

/* ends NAME... ERE: waits for the ends of talks, which must match it. */
static int
main_ends(int argc, char **argv)
{
	regex_t re = expression(argv[argc - 1]);
	long until = now_ms() + 60000;
	char *end;
	int i;

	for (i = 1; i < argc - 1; i++) {
		while ((end = ending(argv[i])) == NULL && now_ms() < until)
			sleep_ms(10);
		if (end == NULL || regexec(&re, end, 0, NULL, 0) != 0) {
			printf("%s: %s\n", argv[i], end == NULL ?
			    "does not end" : end);
			return 1;
		}
	}
	return 0;
}

/* nobody N: prints so many ports on which nobody listens. */
static int
main_nobody(int argc, char **argv)
{
	int n = argc > 1 ? atoi(argv[1]) : 0, port;

	for (; n > 0; n--) {
		port = 0;
		if (hear("127.0.0.1", &port, 1) == -1)
			return 1;
		printf("%d\n", port);
	}
	return 0;
}

/* The n-th play: its first client, its origin, the log and standard error. */
static void
judge_play(const char *n)
{
	char file[300], name[300];
	struct stat st;

	snprintf(name, sizeof(name), "c%s.end", n);
	snprintf(file, sizeof(file), "p%s.sees", n);
	if (stat(name, &st) == 0) {
		snprintf(name, sizeof(name), "c%s", n);
		judge_client(name, file);
	}
	snprintf(name, sizeof(name), "o%s", n);
	snprintf(file, sizeof(file), "p%s.gets", n);
	judge_origin(name, file);
	snprintf(file, sizeof(file), "p%s.log", n);
	hold_file("log", file, "log", "");
	snprintf(file, sizeof(file), "p%s.err", n);
	hold_file("stderr", file, "err", "");
}

/*
 * judge [OPTION ...] PLAY [CLIENT ...]: has everybody in play N seen what he
 * must?
 */
static int
main_judge(int argc, char **argv)
{
	int c, i = looking_at(argc, argv);
	char file[300];

	if (i == argc)
		return probes ? (judge_served(), 0) : 2;
	for (c = i + 1; c < argc; c++) {
		snprintf(file, sizeof(file), "p%s.%s.sees", argv[i], argv[c]);
		judge_client(argv[c], file);
	}
	judge_play(argv[i]);
	if (probes)
		judge_served();
	return 0;
}

/*
 * begin LOG ERR [-a ADDRESS] [-p PORT] [NAME]: prints where new lines of two
 * files will be; then the same as origin, if there is a NAME
 */
static int
main_begin(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	printf("%lu %lu%c", (unsigned long)file_lines(argv[1]) + 1,
	    (unsigned long)file_lines(argv[2]) + 1, argc > 3 ? ' ' : '\n');
	return argc > 3 ? main_origin(argc - 2, argv + 2) : 0;
}

/*
 * The n-th play, of one client and one origin: sets what %O and %p are.  Prints
 * the origin's name, port and process, if there is one.
 */
static void
play_plain(const char *n)
{
	static char at[40], name[40], port_text[12], title_text[500];
	char file[300], client[300];
	struct text t = { NULL, 0 }, origin = { NULL, 0 }, script = { NULL, 0 };
	int fd, port = 0;
	pid_t pid;

	snprintf(file, sizeof(file), "p%s.title", n);
	(void)text_file(&t, file);
	snprintf(title_text, sizeof(title_text), "%.*s",
	    (int)strcspn(t.bytes, "\n"), t.bytes);
	title = title_text;
	log_from = file_lines(log_file) + 1;
	err_from = file_lines(err_file) + 1;
	snprintf(file, sizeof(file), "p%s.origin", n);
	if (text_file(&origin, file)) {
		FILE *pids = fopen(".pids", "a");

		snprintf(name, sizeof(name), "o%s", n);
		fd = hear("127.0.0.1", &port, 128);
		if (fd == -1 || pids == NULL)
			failed("no origin");
		fflush(stdout);
		pid = part();
		if (pid == 0)
			origin_serve(fd, name, origin.bytes);
		close(fd);
		fprintf(pids, "%ld\n", (long)pid);
		fclose(pids);
		snprintf(port_text, sizeof(port_text), "%d", port);
		snprintf(at, sizeof(at), "127.0.0.1:%d", port);
		origin_at = at;
		port_at = port_text;
		printf("%s %d %ld ", name, port, (long)pid);
	}
	snprintf(file, sizeof(file), "p%s.client", n);
	(void)text_file(&script, file);
	snprintf(client, sizeof(client), "c%s", n);
	client_play(proxy_at, client, addressed(script.bytes));
	judge_play(n);
	if (probes)
		judge_served();
	free(t.bytes);
	free(origin.bytes);
	free(script.bytes);
}

/* The client with a name (or without) in the play that is cut. */
static struct role {
	char name[40];		/* with a point before it */
	int begun;
	const char *behind;	/* the operator of a check right behind a body */
} roles[100];
static int play_now;
static int play_closed;		/* what comes is for the next connection */

/* A line in two pieces for a file of the play. */
static void
put(const char *who, const char *name, const char *before, const char *text)
{
	char file[60];
	struct kept *k;

	snprintf(file, sizeof(file), "p%d%.20s%.20s", play_now, who, name);
	k = kept_file(file);
	if (k == NULL) {
		kept = grow(kept, (kept_n + 1) * sizeof(*kept));
		k = &kept[kept_n++];
		memset(k, 0, sizeof(*k));
		strcpy(k->name, file);
	}
	text_add(&k->text, before, strlen(before));
	text_add(&k->text, text, strlen(text));
	text_add(&k->text, "\n", 1);
}

/* Writes what is kept for the shell. */
static void
kept_write(void)
{
	FILE *f;
	size_t i;

	for (i = 0; i < kept_n; i++) {
		f = fopen(kept[i].name, "w");
		if (f == NULL)
			die(kept[i].name);
		fwrite(kept[i].text.bytes, 1, kept[i].text.len, f);
		fclose(f);
	}
}

/* What is to be done by the shell. */
static void
put_shell(const char *name, const char *what, const char *text)
{
	put("", name, what, text);
	put("", ".shell", "", "");
}

static void
play_next(const char *text)
{
	char file[40];

	memset(roles, 0, sizeof(roles));
	play_closed = 0;
	snprintf(file, sizeof(file), "p%d.title", ++play_now);
	if (file_is_there(file))
		failed("there is a play %d", play_now);
	put("", ".title", text, "");
}

static struct role *
role_of(const char *name)
{
	struct role *r = roles;

	while (r->behind != NULL && strcmp(r->name, name) != 0)
		r++;
	if (r->behind == NULL) {
		snprintf(r->name, sizeof(r->name), "%s", name);
		r->behind = "";
	}
	return r;
}

/* A check for a file of the play. */
static void
put_check(const char *who, const char *name, const char *op, const char *text)
{
	char start[50];

	snprintf(start, sizeof(start), "%s ", op);
	put(who, name, start, text);
}

/* One check of what a client must see. */
static void
sees(struct role *r, const char *op, const char *before, const char *text)
{
	char start[80];

	snprintf(start, sizeof(start), "%s %s", op, before);
	put(r->name, ".sees", start, text);
	r->behind = "";
}

/* Cuts s at the first `at', if it is there; returns what is behind, or NULL. */
static char *
cut_at(char *s, const char *at)
{
	char *found = strstr(s, at);

	if (found == NULL)
		return NULL;
	*found = '\0';
	return found + strlen(at);
}

static void
trim(char *s)
{
	size_t n = strlen(s);

	while (n > 0 && s[n - 1] == ' ')
		s[--n] = '\0';
}

/*
 * The checks of an answer: "STATUS error=ERE cut; CACHE-STATUS | BODY".  If it is
 * the first, or the body before was looked at, it begins in the very next line.
 */
static void
answered(struct role *r, char *all)
{
	char *want = all, *body, *cache, *error, *end;
	int cut = 0;

	want[-1] = ' ';		/* it may begin with the bar */
	body = cut_at(want - 1, " | ");
	if (body != NULL && body <= want + 2)
		*(want = all + strlen(all)) = '\0';
	cache = cut_at(want, ";");
	trim(want);
	end = want + strlen(want);
	if (end - want >= 4 && strcmp(end - 4, " cut") == 0) {
		cut = 1;
		end[-4] = '\0';
	}
	error = cut_at(want, " error=");
	want += strspn(want, " ");
	trim(want);
	if (strlen(want) > 3 && want[0] >= '1' && want[0] <= '5' &&
	    want[3] == ' ')
		sees(r, *r->behind ? "+" : "=", "HTTP/1.1 ", want);
	else if (*want != '\0')
		sees(r, *r->behind ? "+~" : "~", "^HTTP/1.1 ", want);
	if (cache != NULL) {
		trim(cache);
		sees(r, "~", "^Cache-Status: proxy-ID;", cache);
	}
	if (error != NULL)
		sees(r, "~", "^Proxy-Status: proxy-ID; error=", error);
	if (body != NULL) {
		sees(r, "=", "", body);
		r->behind = "+";
	}
	if (cut)
		sees(r, "~", "", "^-- end (eof|reset) answer");
}

/* What begins where the first step of a client is. */
static void
role_begins(struct role *r)
{
	if (r->begun++)
		return;
	if (r->name[0] == '\0')
		put("", ".run", "front", "");
	else
		put_shell(".run", "begin ", r->name + 1);
}

/* One step of an origin. */
static void
put_origin(const char *word, const char *rest)
{
	int replies = *word == 'r';
	char start[20];

	if (replies && play_closed)
		put("", ".origin", "---", "");
	play_closed = strcmp(word, "replies") != 0 &&
	    strncmp(replies ? "reply " : rest, "reply ", 6) == 0 &&
	    strstr(rest, "Connection: close") != NULL;
	snprintf(start, sizeof(start), "%s ", word);
	put("", ".origin", replies ? start : "",
	    !replies && strcmp(rest, "next") == 0 ? "---" : rest);
}

/* A line of a play: the word it begins with, an operator, and the rest. */
static void
play_line(struct role *r, char *line, const char *tag, const char *op,
    char *rest)
{
	char *want, start[60];

	if (strcmp(tag, "do") == 0)
		put_shell(".run", "do ", rest);
	else if (strcmp(tag, "sees") == 0)
		sees(r, *op == '\0' ? "=" : op, "", rest);
	else if (strcmp(tag, "gets") == 0 || strcmp(tag, "err") == 0)
		put_check(".", tag, *op == '\0' ? "=" : op, rest);
	else if (strcmp(tag, "log") == 0)
		put_check("", ".log", *op == '\0' ? "~" :
		    strcmp(op, "!") == 0 ? "!~" : op, rest);
	else if (r->name[0] != '\0' && strcmp(tag, "ends") == 0) {
		snprintf(start, sizeof(start), "ends %s ", r->name + 1);
		put_shell(".run", start, rest);
	} else if (strcmp(tag, "origin") == 0 && *rest == '-')
		put_shell(".options", "", rest);
	else if (strcmp(tag, "origin") == 0 || strcmp(tag, "reply") == 0 ||
	    strcmp(tag, "replies") == 0)
		put_origin(tag, rest);
	else if (strcmp(tag, "ask") == 0) {
		want = cut_at(rest, " = ");
		trim(rest);
		if (!r->begun)
			r->behind = "+";
		if (want != NULL)
			answered(r, want);
		role_begins(r);
		put(r->name, ".client", "ask ", rest);
	} else if (strcmp(tag, "client") == 0 || r->name[0] != '\0') {
		role_begins(r);
		put(r->name, ".client", "", *tag == 'c' ? rest : line);
	} else
		put_shell(".bad", "bad line in a play: ", line);
}

/* Cuts the text of plays, from the one behind number n on, into files. */
static void
plays_cut(int n, char *text)
{
	char **lines, *s, *rest, tag[40], op[40], name[40];
	size_t count = cut_lines(text, &lines), i, k;

	play_now = n;
	play_next(title);
	for (i = 0; i < count; i++) {
		s = lines[i] + strspn(lines[i], " \t");
		if (strncmp(s, "== ", 3) == 0)
			play_next(s + 3);
		if (strncmp(s, "== ", 3) == 0 || *s == '#' || *s == '\0')
			continue;
		k = strspn(s, "abcdefghijklmnopqrstuvwxyz0123456789");
		name[0] = '\0';
		if (k > 0 && s[k] == ':' && !isdigit((unsigned char)*s)) {
			snprintf(name, sizeof(name), ".%.*s", (int)k, s);
			s += k + 1;
			s += strspn(s, " ");
		}
		k = strspn(s, "abcdefghijklmnopqrstuvwxyz");
		snprintf(tag, sizeof(tag), "%.*s", (int)k, s);
		rest = s + (k > 0 ? strcspn(s, " \t") : 0);
		snprintf(op, sizeof(op), "%.*s", (int)(rest - s - (long)k), s + k);
		rest += k > 0 ? strspn(rest, " \t") : 0;
		if (strcmp(op, "#") == 0) {	/* "# N ERE" to "#N ERE" */
			snprintf(op, sizeof(op), "#%ld", strtol(rest, &rest, 10));
			rest += *rest == ' ';
		}
		play_line(role_of(name), s, tag, op, rest);
	}
	free(lines);
}

/*
 * plays [OPTION ...] N: the n-th play and those behind it, up to one that needs
 * the shell; with -t TITLE they are cut from stdin first.  Prints where the lines of the last one begin in log and err, its
 * number, and what play_plain() prints.
 */
static int
main_plays(int argc, char **argv)
{
	int i = looking_at(argc, argv), n, from;
	char file[300], number[20];

	if (i + 1 != argc)
		return 2;
	if (*title != '\0')
		plays_cut(atoi(argv[i]) - 1, read_stdin());
	for (n = from = atoi(argv[i]); ; n++) {
		snprintf(file, sizeof(file), "p%d.shell", n);
		if (file_is_there(file)) {
			kept_write();
			break;
		}
		snprintf(file, sizeof(file), "p%d.title", n);
		if (!file_is_there(file))
			break;
		snprintf(number, sizeof(number), "%d", n);
		play_plain(number);
	}
	if (n > from)
		printf("%lu %lu %d\n%s\n", (unsigned long)log_from,
		    (unsigned long)err_from, n - 1, title);
	return 0;
}

/* banner FILE PID: where a proxy listens, as soon as it says so in FILE */
static int
main_banner(int argc, char **argv)
{
	static const char says[] = "proxy: listening on ";
	long deadline = now_ms() + 60000;

	while (argc == 3 && now_ms() < deadline) {
		struct text t = { NULL, 0 };
		char *s;

		(void)text_file(&t, argv[1]);
		for (s = t.bytes; (s = strstr(s, says)) != NULL; s++)
			if ((s == t.bytes || s[-1] == '\n') &&
			    strchr(s, '\n') != NULL) {
				s += strlen(says);
				printf("%.*s\n", (int)strcspn(s, "\n"), s);
				return 0;
			}
		free(t.bytes);
		if (kill((pid_t)atol(argv[2]), 0) == -1)
			break;
		sleep_ms(5);
	}
	return 1;
}

/* Kills a process that is still there after so long; tells it to end before. */
static int
watch(long ms, pid_t pid, int tell)
{
	long end = now_ms() + ms;

	if (pid <= 1)
		return 2;
	while (now_ms() < end) {
		if (kill(pid, tell-- > 0 ? SIGTERM : 0) == -1)
			return 0;
		sleep_ms(5);
	}
	return kill(pid, SIGKILL) == 0 ? 0 : 1;
}

/* watch MS PID */
static int
main_watch(int argc, char **argv)
{
	return argc == 3 ? watch(atol(argv[1]), (pid_t)atol(argv[2]), 0) : 2;
}

/*
 * Sends the signal to all processes, but us and our parent, whose directory is ours
 * or below it; with KILL it prints them.  Returns how many there are; 0 where /proc
 * does not tell.
 */
static int
signal_here(int number)
{
	char here[1024], file[300], at[1024];
	DIR *proc = opendir("/proc");
	struct dirent *d;
	size_t len;
	int n = 0;

	if (getcwd(here, sizeof(here)) == NULL || proc == NULL)
		return 0;
	len = strlen(here);
	while ((d = readdir(proc)) != NULL) {
		struct text command = { NULL, 0 };
		pid_t pid = (pid_t)atol(d->d_name);

		memset(at, 0, sizeof(at));
		snprintf(file, sizeof(file), "/proc/%s/cwd", d->d_name);
		if (pid <= 1 || pid == getpid() || pid == getppid() ||
		    readlink(file, at, sizeof(at) - 1) == -1 ||
		    memcmp(at, here, len) != 0 ||
		    (at[len] != '/' && at[len] != '\0'))
			continue;
		snprintf(file, sizeof(file), "/proc/%s/cmdline", d->d_name);
		if (number == SIGKILL && text_file(&command, file))
			printf("does not end: %s %s\n", d->d_name, command.bytes);
		free(command.bytes);
		n += kill(pid, number) == 0;
	}
	closedir(proc);
	return n;
}

/* Ends all of them; prints those that have to be killed. */
static void
end_here(void)
{
	long until = now_ms() + 20000;

	while (signal_here(SIGTERM) > 0 && now_ms() < until)
		sleep_ms(5);
	if (now_ms() >= until)
		(void)signal_here(SIGKILL);
}

/*
 * reap DIRECTORY ERR...: ends what was started in this directory: other processes
 * whose numbers are in its file .pids, proxies in .proxies, which are told to end
 * and then to end at once, and whoever else is there.  Prints those that do not end,
 * and lines in the other files that tell of a crash.
 */
static int
main_reap(int argc, char **argv)
{
	char **line;
	size_t i, n;
	int file;

	if (argc < 2 || chdir(argv[1]) == -1)
		return 2;
	for (file = 0; file < argc; file++) {
		struct text t = { NULL, 0 };

		(void)text_file(&t, file == 0 ? ".pids" : file == 1 ? ".proxies" :
		    argv[file]);
		n = cut_lines(t.bytes, &line);
		for (i = 0; i < n; i++)
			if (file == 0 && atol(line[i]) > 1)
				(void)kill((pid_t)atol(line[i]), SIGTERM);
			else if (file == 1)
				(void)watch(10000, (pid_t)atol(line[i]), 2);
			else if (strstr(line[i], "runtime error:") != NULL ||
			    strstr(line[i], "Assertion") != NULL ||
			    (strstr(line[i], "ERROR: ") != NULL &&
			    strstr(line[i], "Sanit") != NULL))
				puts(line[i]);
	}
	end_here();
	return 0;
}

static pid_t running;

static void
run_late(int number)
{
	(void)number;
	kill(running, SIGKILL);
}

/* run MS COMMAND: its exit status; it is killed when time is up */
static int
main_run(int argc, char **argv)
{
	int status;
	struct itimerval end = { { 0, 0 }, { 0, 0 } };

	if (argc < 3)
		return 2;
	running = fork();
	if (running == 0) {
		signal(SIGPIPE, SIG_DFL);
		execv(argv[2], argv + 2);
		_exit(127);
	}
	signal(SIGALRM, run_late);
	end.it_value.tv_sec = atol(argv[1]) / 1000;
	setitimer(ITIMER_REAL, &end, NULL);
	while (waitpid(running, &status, 0) == -1)
		if (errno != EINTR)
			return 127;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* sleep MS */
static int
main_sleep(int argc, char **argv)
{
	sleep_ms(argc == 2 ? atol(argv[1]) : 0);
	return 0;
}

/* clock: milliseconds from some time on */
static int
main_clock(int argc, char **argv)
{
	(void)argc, (void)argv;
	printf("%ld\n", now_ms());
	return 0;
}

/* childless COMMAND: which inherits that SIGCHLD is ignored */
static int
main_childless(int argc, char **argv)
{
	signal(SIGCHLD, SIG_IGN);
	return argc > 1 ? execv(argv[1], argv + 1) : 127;
}

/* blocked COMMAND: which inherits that all signals are blocked */
static int
main_blocked(int argc, char **argv)
{
	sigset_t all;

	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	return argc > 1 ? execv(argv[1], argv + 1) : 127;
}

/* reaper COMMAND: which inherits orphans, as process 1 does; 77 if it can't */
static int
main_reaper(int argc, char **argv)
{
#ifdef PR_SET_CHILD_SUBREAPER
	if (argc > 1 && prctl(PR_SET_CHILD_SUBREAPER, 1) == 0)
		return execv(argv[1], argv + 1);
#endif
	(void)argc, (void)argv;
	return 77;
}

/* full PATH: a UNIX socket that nobody accepts at, with a full queue. */
static int
main_full(int argc, char **argv)
{
	struct sockaddr_un un;
	int fd = socket(AF_UNIX, SOCK_STREAM, 0), c;

	memset(&un, 0, sizeof(un));
	un.sun_family = AF_UNIX;
	strncpy(un.sun_path, argv[argc - 1], sizeof(un.sun_path) - 1);
	if (bind(fd, (struct sockaddr *)&un, sizeof(un)) == -1 ||
	    listen(fd, 0) == -1)
		return 1;
	do {
		c = socket(AF_UNIX, SOCK_STREAM, 0);
		fcntl(c, F_SETFL, O_NONBLOCK);
	} while (connect(c, (struct sockaddr *)&un, sizeof(un)) == 0);
	puts("ready");
	fflush(stdout);
	for (;;)
		pause();
}

/*
 * logger PATH N: prints "ready" and N datagrams to PATH, which may have an @ for
 * the NUL of an abstract name, then reads no more.
 */
static int
main_logger(int argc, char **argv)
{
	struct sockaddr_un un;
	socklen_t len = sizeof(un);
	int n = argc == 3 ? atoi(argv[2]) : 0, fd = socket(AF_UNIX, SOCK_DGRAM, 0);
	char line[70000];

	memset(&un, 0, sizeof(un));
	un.sun_family = AF_UNIX;
	strncpy(un.sun_path, argv[1], sizeof(un.sun_path) - 1);
	if (*argv[1] == '@') {
		un.sun_path[0] = '\0';
		len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) +
		    strlen(argv[1]));
	} else
		unlink(argv[1]);
	if (bind(fd, (struct sockaddr *)&un, len) == -1)
		return 1;
	puts("ready");
	for (fflush(stdout); n-- > 0; fflush(stdout))
		printf("%.*s\n", (int)read(fd, line, sizeof(line)), line);
	for (;;)
		pause();
}

static pid_t on_terminal;	/* a process that has it */

/* Runs a command on a terminal of its own; returns our side of it, or -1. */
static int
terminal_run(char **command)
{
	int i, slave, master = posix_openpt(O_RDWR | O_NOCTTY);

	if (master == -1 || grantpt(master) == -1 || unlockpt(master) == -1)
		return -1;
	on_terminal = fork();
	if (on_terminal == 0) {
		setsid();
		slave = open(ptsname(master), O_RDWR);
		close(master);
		for (i = 0; i < 3; i++)
			dup2(slave, i);
		close(slave);
		execv(command[0], command);
		_exit(9);
	}
	return master;
}

/*
 * terminal COMMAND: runs it on a terminal of its own and closes that; 0 if it
 * then ends by itself with 0, 77 if there are no terminals.
 */
static int
main_terminal(int argc, char **argv)
{
	int i, status, master = terminal_run(argv + 1);
	char said[4096];

	(void)argc;
	if (master == -1)
		return 77;
	if (read(master, said, sizeof(said)) <= 0)
		return 2;
	sleep_ms(300);
	close(master);
	for (i = 0; i < 50; i++) {
		if (waitpid(on_terminal, &status, WNOHANG) == on_terminal)
			return WIFEXITED(status) ? WEXITSTATUS(status) : 3;
		sleep_ms(100);
	}
	kill(on_terminal, SIGKILL);
	return 4;
}

/*
 * Ends what is on the terminal before that is closed: the kernel sends SIGCONT then,
 * which takes away the SIGSTOP by which a leak check stops the program at its end,
 * and both would wait forever.
 */
static void
end_terminal(int number)
{
	(void)watch(10000, on_terminal, 1);
	_exit(number);
}

/*
 * stalled COMMAND: runs a proxy on a terminal of its own; once that has told an
 * address, prints it and reads no more of what the proxy writes there.
 */
static int
main_stalled(int argc, char **argv)
{
	int master = terminal_run(argv + 1);
	static char said[4096];
	size_t n = 0;
	char *at;

	(void)argc;
	if (master == -1)
		return 77;
	signal(SIGCHLD, SIG_IGN);
	signal(SIGTERM, end_terminal);
	while ((at = strstr(said, "listening on ")) == NULL ||
	    strchr(at, '\n') == NULL)
		if (read(master, said + n++, 1) != 1 || n == sizeof(said) - 1)
			return 2;
	printf("%.*s\n", (int)strcspn(at + 13, "\r\n"), at + 13);
	fflush(stdout);
	for (;;)
		pause();
}

/*
 * launch listen|both|wrong|inetd FILE COMMAND: runs it as a service manager does,
 * with a socket whose address is in FILE (both: of both families; wrong: with a
 * pipe), or its first client.
 */
static int
main_launch(int argc, char **argv)
{
	int both = argc > 1 && strcmp(argv[1], "both") == 0, port = 0, pair[2], i;
	int fd = hear(both ? "::" : "127.0.0.1", &port, 10);
	FILE *file = argc > 3 ? fopen(argv[2], "w") : NULL;
	char pid[30];

	if (fd == -1 || file == NULL)
		return 1;
	fprintf(file, "127.0.0.1:%d\n", port);
	fclose(file);
	if (strcmp(argv[1], "inetd") == 0) {
		fd = accept(fd, NULL, NULL);
		for (i = 0; i < 3; i++)
			dup2(fd, i);
		close(fd);
	} else {
		if (strcmp(argv[1], "wrong") == 0 && pipe(pair) == 0)
			fd = pair[0];
		if (fd != 3)
			dup2(fd, 3);
		if (strcmp(argv[1], "shut") == 0 && fork() == 0) {
			while (access("shut", F_OK) == -1)
				(void)poll(NULL, 0, 20);
			return shutdown(fd, SHUT_RDWR);
		}
		snprintf(pid, sizeof(pid), "%ld", (long)getpid());
		setenv("LISTEN_PID", pid, 1);
		if (getenv("LISTEN_FDS") == NULL)
			setenv("LISTEN_FDS", "1", 1);
	}
	signal(SIGPIPE, SIG_DFL);
	execv(argv[3], argv + 3);
	return 127;
}

/* ---- Other ends that behave oddly, and what measures ---- */

static char block[1 << 18];
static unsigned long seed;

static unsigned long
draw(unsigned long n)
{
	seed = (seed * 1103515245 + 12345) & 0x7fffffff;
	return (seed >> 8) % n;
}

/* Sends all of it, until the time is up; false if it can't. */
static int
send_all(int fd, const char *p, size_t n, long end)
{
	struct pollfd one;

	one.fd = fd;
	one.events = POLLOUT;
	while (n > 0) {
		ssize_t done;

		if (now_ms() >= end)
			return 0;
		if (poll(&one, 1, 100) != 1)
			continue;
		done = send(fd, p, n, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (done == -1 && (one.revents & (POLLERR | POLLHUP)))
			return 0;
		if (done > 0) {
			p += done;
			n -= (size_t)done;
		}
	}
	return 1;
}

static void
flood_one(const char *where, long end)
{
	static const char head[] = "POST http://127.0.0.1:1/ HTTP/1.1\r\n"
	    "Content-Length: 999999999999\r\n\r\n";
	int fd;

	while (now_ms() < end && (fd = dial(where)) != -1) {
		if (send_all(fd, head, strlen(head), end))
			while (send_all(fd, block, sizeof(block), end))
				;
		close(fd);
	}
}

static void
visit(const char *where, long end)
{
	static const char head[] = "GET /nothing HTTP/1.1\r\n\r\n";
	struct pollfd one;
	char got[1000];

	one.events = POLLIN;
	while (now_ms() < end && (one.fd = dial(where)) != -1) {
		sleep_ms((long)draw(2));
		if (send_all(one.fd, head, strlen(head), end) &&
		    poll(&one, 1, 200) == 1)
			(void)recv(one.fd, got, sizeof(got), 0);
		close(one.fd);
	}
}

/*
 * One request with a body of chunks of all sizes, until nothing is taken any
 * more, or END.  Reads nothing before that; stays until it is closed.
 */
static void
upload(const char *where, const char *text, long end)
{
	int fd = dial(where);
	struct text head = unescaped(text, strlen(text));

	if (!send_all(fd, head.bytes, head.len, end))
		return;
	for (;;) {
		static char chunk[40000];
		size_t n = draw(25000) + 1, k = 0;

		if (draw(2))
			while (k < n)
				k += (size_t)sprintf(chunk + k, "1\r\nx\r\n");
		else {
			k = (size_t)sprintf(chunk, "%lx\r\n",
			    (unsigned long)n);
			memset(chunk + k, 'x', n);
			memcpy(chunk + k + n, "\r\n", 2);
			k += n + 2;
		}
		if (!send_all(fd, chunk, k, end))
			break;
	}
	while (recv(fd, block, sizeof(block), 0) > 0)
		;
}

static void
slow_one(int fd)
{
	static const char answer[] = "HTTP/1.1 413 Too much\r\n"
	    "Content-Length: 0\r\n\r\n";
	struct linger hard = { 1, 0 };
	long left = 20000 + (long)draw(400000), n;
	long end = now_ms() + 5000;

	while (left > 0 && (n = recv(fd, block, 500 + draw(9000), 0)) > 0) {
		left -= n;
		sleep_ms((long)draw(4));
	}
	if (draw(2))
		(void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &hard,
		    sizeof(hard));
	else {
		(void)send_all(fd, answer, strlen(answer), end);
		sleep_ms(800);
	}
	close(fd);
}

static int
main_slow(int argc, char **argv)
{
	int port = 0, fd = hear("127.0.0.1", &port, 64), c, small = 4096;

	(void)argc, (void)argv;
	if (fd == -1)
		return 1;
	(void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
	detach(port);
	alarm(20);
	signal(SIGCHLD, SIG_IGN);
	while ((c = accept(fd, NULL, NULL)) != -1) {
		seed++;
		if (fork() == 0) {
			alarm(10);
			slow_one(c);
			_exit(0);
		}
		close(c);
	}
	return 1;
}

struct cgi {
	char method[16], path[1024], key[64], type[128], coding[32];
	long length;
	int chunked, expect, close;
};

/* Sec-WebSocket-Accept for a key, RFC 6455 section 4.2.2, by openssl. */
static void
websocket_accept(const char *key, char *out, int size)
{
	char command[300];
	FILE *f;

	snprintf(command, sizeof command, "printf %%s '%.24s258EAFA5-E914-47DA-"
	    "95CA-C5AB0DC85B11' | openssl dgst -sha1 -binary | openssl base64",
	    key);
	signal(SIGCHLD, SIG_DFL);
	f = strchr(key, '\'') == NULL ? popen(command, "r") : NULL;
	if (f == NULL || !fgets(out, size, f))
		die("openssl");
	out[strcspn(out, "\n")] = '\0';
	pclose(f);
}

/* Copies the value of the field called name from line, if it is that. */
static int
field_is(const char *line, const char *name, char *value, size_t size)
{
	size_t n = strlen(name);

	if (strncasecmp(line, name, n) != 0 || line[n] != ':')
		return 0;
	line += n + 1 + strspn(line + n + 1, " ");
	snprintf(value, size, "%.*s", (int)strcspn(line, "\r\n"), line);
	return 1;
}

static int
cgi_read(FILE *in, struct cgi *r)
{
	char line[8192], value[1024];

	memset(r, 0, sizeof *r);
	r->length = -1;
	if (!fgets(line, sizeof line, in) ||
	    sscanf(line, "%15s %1023s", r->method, r->path) != 2)
		return 0;
	while (fgets(line, sizeof line, in) && line[0] != '\r') {
		(void)field_is(line, "Sec-WebSocket-Key", r->key, sizeof r->key);
		(void)field_is(line, "Content-Type", r->type, sizeof r->type);
		(void)field_is(line, "Content-Encoding", r->coding,
		    sizeof r->coding);
		if (field_is(line, "Content-Length", value, sizeof value))
			r->length = strtol(value, NULL, 10);
		if (field_is(line, "Transfer-Encoding", value, sizeof value))
			r->chunked = 1;
		if (field_is(line, "Expect", value, sizeof value))
			r->expect = 1;
		if (field_is(line, "Connection", value, sizeof value))
			r->close = strcasecmp(value, "close") == 0;
	}
	return 1;
}

static long
pass_on(FILE *in, FILE *out, long n)
{
	char buf[65536];
	long done = 0;
	size_t want, got;

	for (; done < n; done += (long)got) {
		want = n - done < (long)sizeof buf ? (size_t)(n - done) :
		    sizeof buf;
		got = fread(buf, 1, want, in);
		if (got == 0)
			break;
		fwrite(buf, 1, got, out);
	}
	return done;
}

/* Writes the body of r to body. Returns its size, -1 if it was cut short. */
static long
body_read(FILE *in, FILE *out, const struct cgi *r, FILE *body)
{
	char line[256];
	long n, sum = 0;

	if (r->expect) {
		fputs("HTTP/1.1 100 Continue\r\n\r\n", out);
		fflush(out);
	}
	if (!r->chunked)
		return r->length <= 0 ? 0 :
		    pass_on(in, body, r->length) == r->length ? r->length : -1;
	do {
		if (!fgets(line, sizeof line, in))
			return -1;
		n = strtol(line, NULL, 16);
		if (pass_on(in, body, n) != n)
			return -1;
		sum += n;
		if (n > 0 && !fgets(line, sizeof line, in))
			return -1;
	} while (n > 0);
	while (fgets(line, sizeof line, in) && line[0] != '\r')
		continue;
	return sum;
}

static void
say_ok(FILE *out, const char *type, const char *text)
{
	fprintf(out, "HTTP/1.1 200 OK\r\nContent-Type: %s\r\n"
	    "Content-Length: %lu\r\n\r\n%s", type,
	    (unsigned long)strlen(text), text);
	fflush(out);
}

/* Reads one frame, at most size bytes. Returns its length, -1 at the end. */
static long
frame_read(FILE *in, int *first, unsigned char *p, long size)
{
	unsigned char mask[4] = { 0 };
	long n, i;
	int c, more;

	if ((*first = getc(in)) == EOF || (c = getc(in)) == EOF)
		return -1;
	n = c & 127;
	more = n == 126 ? 2 : n == 127 ? 8 : 0;
	for (n = more ? 0 : n; more > 0; more--)
		n = n << 8 | getc(in);
	if (c & 128 && fread(mask, 1, 4, in) != 4)
		return -1;
	if (n < 0 || n > size || fread(p, 1, (size_t)n, in) != (size_t)n)
		return -1;
	for (i = 0; i < n; i++)
		p[i] ^= mask[i % 4];
	return n;
}

/* Writes one frame. */
static void
frame_write(FILE *out, int first, const unsigned char *p, long n)
{
	int i;

	putc(first, out);
	putc(n < 126 ? (int)n : n < 65536 ? 126 : 127, out);
	for (i = n < 126 ? 0 : n < 65536 ? 2 : 8; i > 0; i--)
		putc((int)((uint64_t)n >> 8 * (i - 1) & 255), out);
	fwrite(p, 1, (size_t)n, out);
	fflush(out);
}

static void
websocket_serve(FILE *in, FILE *out, const char *key)
{
	static unsigned char p[1 << 20];
	char accept[32];
	int first;
	long n;

	websocket_accept(key, accept, sizeof accept);
	fprintf(out, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket"
	    "\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
	    accept);
	fflush(out);
	while ((n = frame_read(in, &first, p, sizeof p)) >= 0) {
		frame_write(out, first, p, n);
		if ((first & 15) == 8)
			break;
		if (n == 4 && memcmp(p, "done", 4) == 0)
			touch_file("done");
	}
}

static void
git_environment(struct cgi *r)
{
	char number[32];
	char *query = strchr(r->path, '?');

	if (query)
		*query++ = '\0';
	setenv("PATH_INFO", r->path + strlen("/git"), 1);
	setenv("QUERY_STRING", query ? query : "", 1);
	setenv("REQUEST_METHOD", r->method, 1);
	setenv("CONTENT_TYPE", r->type, 1);
	setenv("GIT_PROJECT_ROOT", "git", 1);
	setenv("GIT_HTTP_EXPORT_ALL", "1", 1);
	if (r->coding[0])
		setenv("HTTP_CONTENT_ENCODING", r->coding, 1);
	if (r->length >= 0 && !r->chunked) {
		snprintf(number, sizeof number, "%ld", r->length);
		setenv("CONTENT_LENGTH", number, 1);
	}
}

/* One CGI call; the answer ends with the connection. */
static void
git_serve(FILE *out, struct cgi *r, FILE *body)
{
	char line[4096], status[64] = "200 OK", fields[8192] = "";
	FILE *from;
	int fd[2];

	if (pipe(fd) == -1)
		die("pipe");
	git_environment(r);
	if (fork() == 0) {
		signal(SIGCHLD, SIG_DFL);
		signal(SIGPIPE, SIG_DFL);
		lseek(fileno(body), 0, SEEK_SET);
		dup2(fileno(body), 0);
		dup2(fd[1], 1);
		close(fd[0]);
		close(fd[1]);
		execlp("git", "git", "http-backend", (char *)NULL);
		die("git http-backend");
	}
	close(fd[1]);
	from = fdopen(fd[0], "r");
	while (fgets(line, sizeof line, from) && line[0] != '\r')
		if (!field_is(line, "Status", status, sizeof status) &&
		    strlen(fields) + strlen(line) < sizeof fields)
			strcat(fields, line);
	fprintf(out, "HTTP/1.1 %s\r\nConnection: close\r\n%s\r\n", status,
	    fields);
	while (pass_on(from, out, 65536) > 0)
		continue;
	fflush(out);
}

/* Serves one request. Returns whether another may follow. */
static int
cgi_serve(FILE *in, FILE *out, struct cgi *r)
{
	char text[64];
	FILE *body;
	long n;
	int i;

	if (r->key[0]) {
		websocket_serve(in, out, r->key);
		return 0;
	}
	if (strcmp(r->path, "/wait") == 0) {
		for (i = 0; i < 2000 && access("done", F_OK) == -1; i++)
			(void)poll(NULL, 0, 50);
		say_ok(out, "text/javascript", "late = 'came';");
		return !r->close;
	}
	body = strncmp(r->path, "/git/", 5) == 0 ? tmpfile() :
	    fopen("body", "w+");
	if (!body)
		die("body");
	n = body_read(in, out, r, body);
	fflush(body);
	if (strncmp(r->path, "/git/", 5) == 0) {
		git_serve(out, r, body);
		return 0;
	}
	fclose(body);
	snprintf(text, sizeof text, "%s %ld bytes\n", r->method, n);
	say_ok(out, "text/plain", text);
	return !r->close;
}

/* Listens on a port of loopback, and writes that to file. */
static int
listen_at(const char *file)
{
	int port = 0, fd = hear("127.0.0.1", &port, 4096);
	FILE *f = fopen(file, "w");

	if (fd == -1 || f == NULL || fprintf(f, "%d\n", port) < 0 ||
	    fclose(f) == EOF)
		die(file);
	return fd;
}

static int
main_serve(int argc, char **argv)
{
	struct cgi r;
	FILE *in, *out;
	int fd, s = listen_at(argc > 1 ? argv[1] : "");

	signal(SIGCHLD, SIG_IGN);
	while ((fd = accept(s, NULL, NULL)) != -1) {
		if (fork() == 0) {
			close(s);
			alarm(120);
			in = fdopen(fd, "r");
			out = fdopen(dup(fd), "w");
			while (cgi_read(in, &r) && cgi_serve(in, out, &r))
				continue;
			fflush(out);
			exit(0);
		}
		close(fd);
	}
	die("accept");
	return 1;
}

enum { LOAD_MAX = 10240, CLOSED = -1, WAIT_MAX = 1000000 };

struct load {
	char head[2048]; /* of the message that comes */
	size_t len;      /* of that */
	long left;       /* bytes of the body still to come or to send */
	int body;        /* the head is done */
	int close;       /* after this message */
	int used;        /* has carried a message before */
	double asked;    /* in seconds: the request was sent */
};

static struct pollfd fds[LOAD_MAX + 1];
static struct load *conns[LOAD_MAX + 1];
static int proxy_port, origin_port, by_connect, anew, at_random, digits;
static char request[512];
static const char *host;
static long errors, body_size, objects;
static unsigned long *asked;
static unsigned waits[WAIT_MAX + 1]; /* responses, by their microseconds */
static char date[40];

static void
set_up(int fd)
{
	int on = 1;

	if (fcntl(fd, F_SETFL, O_NONBLOCK) == -1 ||
	    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == -1)
		die("set_up");
}

static double
seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Reads on until the head is whole. Returns 1 then, 0 at the end. */
static int
head_wait(int fd, char *head, size_t size)
{
	size_t len = 0;
	ssize_t n;

	while (len < size - 1) {
		n = read(fd, head + len, size - 1 - len);
		if (n <= 0)
			return 0;
		len += (size_t)n;
		head[len] = '\0';
		if (strstr(head, "\r\n\r\n"))
			return 1;
	}
	return 0;
}

/* A new connection, through the tunnel if there is one, or -1. */
static int
load_dial(void)
{
	struct timeval patience = { 10, 0 };
	char head[2048];
	int fd, n;

	snprintf(head, sizeof head, "127.0.0.1:%d", proxy_port ? proxy_port :
	    origin_port);
	fd = dial(head);
	if (fd != -1 && by_connect && proxy_port) {
		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience,
		    sizeof patience);
		n = snprintf(head, sizeof head, "CONNECT 127.0.0.1:%d HTTP/1.1"
		    "\r\nHost: 127.0.0.1:%d\r\n\r\n", origin_port, origin_port);
		if (write(fd, head, (size_t)n) != n ||
		    !head_wait(fd, head, sizeof head) ||
		    strncmp(head + 8, " 200", 4) != 0) {
			close(fd);
			return -1;
		}
	}
	return fd;
}

/* Which object comes next. The dice (xorshift) fall alike in every run. */
static long
object_next(void)
{
	static uint32_t dice = 2463534242u;
	static long turn;

	if (!at_random)
		return turn++ % objects;
	dice ^= dice << 13;
	dice ^= dice >> 17;
	dice ^= dice << 5;
	return (long)(dice % (uint32_t)objects);
}

static void
request_make(void)
{
	char to[64] = "", object[32] = "";

	if (proxy_port && !by_connect && host)
		snprintf(to, sizeof to, "http://%s", host);
	else if (proxy_port && !by_connect)
		snprintf(to, sizeof to, "http://127.0.0.1:%d", origin_port);
	if (objects)
		snprintf(object, sizeof object, "keep/%ld/", object_next());
	snprintf(request, sizeof request, "GET %s/%s%0*ld HTTP/1.1\r\n"
	    "Host: 127.0.0.1:%d\r\nUser-Agent: load\r\nAccept: */*\r\n"
	    "%s\r\n", to, object, digits, body_size, origin_port,
	    anew ? "Connection: close\r\n" : "");
}

/* Sends the next request on a connection, on a new one if need be. */
static void
ask_next(int i, int fresh)
{
	struct load *c = conns[i];
	int used = c->used;

	if (fresh && fds[i].fd != CLOSED) {
		close(fds[i].fd);
		fds[i].fd = CLOSED;
	}
	memset(c, 0, sizeof *c);
	c->used = used && !fresh;
	if (fds[i].fd == CLOSED) {
		fds[i].fd = load_dial();
		fds[i].events = POLLIN;
		if (fds[i].fd == CLOSED) {
			errors++;
			return;
		}
		set_up(fds[i].fd);
	}
	if (objects)
		request_make();
	c->asked = seconds();
	if (write(fds[i].fd, request, strlen(request)) == -1 &&
	    !(c->used && errno == EPIPE))
		errors++;
}

/* Takes what has come of the head. Returns how much of n was not head. */
static long
head_take(struct load *c, const char *p, size_t n)
{
	const char *end, *field;
	size_t room = sizeof c->head - 1 - c->len, old = c->len;

	room = n < room ? n : room;
	memcpy(c->head + c->len, p, room);
	c->len += room;
	c->head[c->len] = '\0';
	end = strstr(c->head, "\r\n\r\n");
	if (!end)
		return 0;
	c->body = 1;
	field = strstr(c->head, "\r\nContent-Length:");
	field = field ? field : strstr(c->head, "\r\ncontent-length:");
	c->left = field ? strtol(field + 17, NULL, 10) : -1;
	if (c->left != body_size)
		c->left = -1;
	c->close = strncmp(c->head, "HTTP/1.1", 8) != 0 ||
	    strstr(c->head, "\r\nConnection: close") ||
	    strstr(c->head, "\r\nconnection: close");
	return (long)(old + n) - (end + 4 - c->head);
}

/* Reads what there is. Returns 1 when the response is whole, -1 if it can't
 * become so, -2 if a kept connection was closed in the meantime. */
static int
response_read(int i)
{
	struct load *c = conns[i];
	ssize_t n = read(fds[i].fd, block, sizeof block);
	long rest;

	if (n == -1 && errno == EAGAIN)
		return 0;
	if (n <= 0)
		return c->used && c->len == 0 ? -2 : -1;
	rest = c->body ? n : head_take(c, block, (size_t)n);
	if (!c->body)
		return 0;
	if (c->left == -1 || strncmp(c->head + 8, " 200", 4) != 0)
		return -1;
	c->left -= rest;
	return c->left == 0 ? 1 : c->left < 0 ? -1 : 0;
}

/* Counts how long a response took. */
static void
wait_count(double took)
{
	waits[took < 1 ? (int)(took * WAIT_MAX) : WAIT_MAX]++;
}

/* The microseconds that 99 % of n responses took at most. */
static int
wait_most(long n)
{
	int us;

	for (us = 0; us < WAIT_MAX && (n -= waits[us]) > 0; us++)
		continue;
	return us;
}

static long
load_client(int n, long count, double end)
{
	long done = 0;
	int i, open = 0, got;

	for (i = 0; i < n; i++) {
		conns[i] = calloc(1, sizeof *conns[i]);
		fds[i].fd = CLOSED;
		ask_next(i, 1);
		open += fds[i].fd != CLOSED;
	}
	while (open > 0 && errors < 100 && seconds() < end + 20) {
		if (poll(fds, (nfds_t)n, 1000) == -1)
			die("poll");
		for (i = 0; i < n; i++) {
			if (fds[i].fd == CLOSED || !fds[i].revents)
				continue;
			got = response_read(i);
			if (got == 0)
				continue;
			done += got == 1;
			if (got == 1)
				wait_count(seconds() - conns[i]->asked);
			errors += got == -1;
			conns[i]->used = 1;
			if (done + n > count || seconds() >= end) {
				close(fds[i].fd);
				fds[i].fd = CLOSED;
			} else {
				ask_next(i, anew || got < 0 || conns[i]->close);
			}
		}
		for (i = 0, open = 0; i < n; i++)
			open += fds[i].fd != CLOSED;
	}
	errors += open;
	return done;
}

/* Sends what is left of the body. Returns whether the connection stays. */
static int
body_write(struct load *c, int fd)
{
	ssize_t n = 1;

	while (c->left > 0 && n > 0) {
		n = write(fd, block, c->left < (long)sizeof block ?
		    (size_t)c->left : sizeof block);
		if (n > 0)
			c->left -= n;
	}
	return c->left > 0 ? errno == EAGAIN : !c->close;
}

static int
request_serve(struct load *c, int fd)
{
	char out[2048];
	ssize_t n = read(fd, c->head + c->len, sizeof c->head - 1 - c->len);
	long size;
	char *at;
	int len, keep;

	if (n <= 0)
		return n == -1 && errno == EAGAIN;
	c->len += (size_t)n;
	c->head[c->len] = '\0';
	if (!strstr(c->head, "\r\n\r\n"))
		return c->len < sizeof c->head - 1;
	at = strstr(c->head, " HTTP/1.");
	while (at && at > c->head && at[-1] != '/')
		at--;
	size = at ? strtol(at, NULL, 10) : 0;
	c->close = strstr(c->head, "\r\nConnection: close") != NULL;
	keep = strstr(c->head, "/keep/") != NULL;
	*asked += (unsigned long)keep;
	c->len = 0;
	len = snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\n"
	    "Date: %s\r\nServer: load\r\n"
	    "Content-Type: application/octet-stream\r\n"
	    "Content-Length: %ld\r\n%s%s\r\n", date, size,
	    keep ? "Cache-Control: max-age=86400\r\n" : "",
	    c->close ? "Connection: close\r\n" : "");
	c->left = size;
	if (size <= (long)sizeof out - len) {
		memcpy(out + len, block, (size_t)size);
		c->left = 0;
		len += (int)size;
	}
	return write(fd, out, (size_t)len) == len && body_write(c, fd);
}

/* The counter in FILE.asked, and the date of all answers: today's. */
static void
origin_ready(const char *file)
{
	char name[256];
	time_t t = time(NULL);
	int fd;

	snprintf(name, sizeof name, "%s.asked", file);
	fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0666);
	if (fd == -1 || ftruncate(fd, sizeof *asked) == -1)
		die(name);
	asked = mmap(NULL, sizeof *asked, PROT_READ | PROT_WRITE, MAP_SHARED,
	    fd, 0);
	if (asked == MAP_FAILED)
		die(name);
	close(fd);
	strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", gmtime(&t));
}

static int
main_load(int argc, char **argv)
{
	int fd, n = 1, i;

	if (argc != 2)
		return 2;
	raise_files();
	memset(block, 'x', sizeof(block));
	origin_ready(argv[1]);
	fds[0].fd = listen_at(argv[1]);
	fds[0].events = POLLIN;
	while (poll(fds, (nfds_t)n, -1) != -1) {
		for (i = n - 1; i > 0; i--) {
			if (!fds[i].revents)
				continue;
			if (conns[i]->left > 0 ?
			    body_write(conns[i], fds[i].fd) :
			    request_serve(conns[i], fds[i].fd)) {
				fds[i].events = conns[i]->left > 0 ? POLLOUT :
				    POLLIN;
				continue;
			}
			close(fds[i].fd);
			free(conns[i]);
			fds[i] = fds[--n];
			conns[i] = conns[n];
		}
		if (!fds[0].revents || n > LOAD_MAX)
			continue;
		fd = accept(fds[0].fd, NULL, NULL);
		if (fd == -1)
			continue;
		set_up(fd);
		conns[n] = calloc(1, sizeof *conns[n]);
		fds[n].fd = fd;
		fds[n].revents = 0;
		fds[n++].events = POLLIN;
	}
	return 1;
}

/* Copies what has come at i to the other end, or closes both. */
static void
relay_step(int i)
{
	int other = i % 2 ? i + 1 : i - 1;
	ssize_t n = read(fds[i].fd, block, sizeof block);

	if (n > 0 && write(fds[other].fd, block, (size_t)n) == n)
		return;
	close(fds[i].fd);
	close(fds[other].fd);
	fds[i].fd = fds[other].fd = CLOSED;
	fds[other].revents = 0;
}

/* Both ends of a connection have neighbouring places, the first one odd. */
static int
main_relay(int argc, char **argv)
{
	int n = 1, i, fd;

	if (argc != 3)
		return 2;
	origin_port = atoi(argv[2]);
	fds[0].fd = listen_at(argv[1]);
	fds[0].events = POLLIN;
	while (poll(fds, (nfds_t)n, -1) != -1) {
		for (i = 1; i < n; i++)
			if (fds[i].revents)
				relay_step(i);
		if (!fds[0].revents)
			continue;
		fd = accept(fds[0].fd, NULL, NULL);
		for (i = 1; i < n && fds[i].fd != CLOSED; i += 2)
			continue;
		if (fd == -1 || i >= LOAD_MAX)
			return 1;
		fds[i].fd = fd;
		fds[i + 1].fd = load_dial();
		fds[i].events = fds[i + 1].events = POLLIN;
		set_up(fd);
		set_up(fds[i + 1].fd);
		n = i + 2 > n ? i + 2 : n;
	}
	return 1;
}

static int
main_idle(int argc, char **argv)
{
	FILE *f;
	int i;

	if (argc != 5)
		return 2;
	raise_files();
	by_connect = 1;
	proxy_port = atoi(argv[1]);
	origin_port = atoi(argv[2]);
	for (i = 0; i < atoi(argv[3]); i++)
		if (load_dial() == -1)
			break;
	f = fopen(argv[4], "w");
	if (!f || fprintf(f, "%d\n", i) < 0 || fclose(f) == EOF)
		die(argv[4]);
	for (;;)
		pause();
}

static int
main_measure(int argc, char **argv)
{
	struct rusage u;
	double start;
	long done;
	int opt;

	raise_files();
	while ((opt = getopt(argc, argv, "cd:k:nrx:z:")) != -1) {
		by_connect |= opt == 'c';
		host = opt == 'd' ? optarg : host;
		anew |= opt == 'n';
		at_random |= opt == 'r';
		objects = opt == 'k' ? atol(optarg) : objects;
		proxy_port = opt == 'x' ? atoi(optarg) : proxy_port;
		digits = opt == 'z' ? atoi(optarg) : digits;
	}
	if (argc - optind != 5)
		return 2;
	argv += optind;
	origin_port = atoi(argv[0]);
	body_size = atol(argv[4]);
	if (!objects)
		request_make();
	start = seconds();
	done = load_client(atoi(argv[1]), atol(argv[2]),
	    start + (double)atol(argv[3]) / 1000);
	start = seconds() - start;
	getrusage(RUSAGE_SELF, &u);
	printf("%ld %.6f %ld %ld %d\n", done, start, errors,
	    (long)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1000000 +
	    (long)(u.ru_utime.tv_usec + u.ru_stime.tv_usec),
	    wait_most(done * 99 / 100));
	return 0;
}

/* Many clients, for so long: those that upload, or flood and visit. */
static int
throng(int n, const char *where, const char *text, long ms)
{
	long end = now_ms() + ms;
	int i;

	alarm(30);
	for (i = 0; i < n; i++)
		if (fork() == 0) {
			seed = (unsigned long)i * 7919 + 17;
			alarm(15);
			if (text != NULL)
				upload(where, text, end);
			else if (i < 3)
				flood_one(where, end);
			else
				visit(where, end);
			_exit(0);
		}
	while (wait(NULL) != -1)
		;
	return 0;
}

static int
main_upload(int argc, char **argv)
{
	return argc != 5 ? 2 :
	    throng(atoi(argv[1]), argv[2], argv[3], atol(argv[4]));
}

static int
main_flood(int argc, char **argv)
{
	return argc != 3 ? 2 : throng(9, argv[1], NULL, atol(argv[2]));
}

int
main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int (*run)(int argc, char **argv);
	} modes[] = { { "sleep", main_sleep }, { "origin", main_origin },
		{ "client", main_client },
		{ "echo", main_echo }, { "deaf", main_deaf },
		{ "watch", main_watch }, { "myself", main_myself },
		{ "reap", main_reap }, { "run", main_run },
		{ "base64", main_base64 }, { "childless", main_childless },
		{ "blocked", main_blocked }, { "reaper", main_reaper },
		{ "full", main_full },
		{ "clock", main_clock }, { "show", main_show },
		{ "logger", main_logger },
		{ "check", main_check }, { "judge", main_judge },
		{ "plays", main_plays },
		{ "begin", main_begin }, { "banner", main_banner },
		{ "lines", main_lines }, { "await", main_await },
		{ "want", main_want }, { "last", main_last },
		{ "ends", main_ends },
		{ "nobody", main_nobody }, { "most", main_most },
		{ "terminal", main_terminal }, { "stalled", main_stalled },
		{ "launch", main_launch }, { "upload", main_upload },
		{ "flood", main_flood }, { "slow", main_slow },
		{ "serve", main_serve },
		{ "load", main_load }, { "measure", main_measure },
		{ "idle", main_idle }, { "relay", main_relay } };
	size_t i;

	if (getenv("PEER_MS") != NULL)
		patience_ms = atol(getenv("PEER_MS"));
	signal(SIGPIPE, SIG_IGN);
	for (i = 0; argc > 1 && i < sizeof(modes) / sizeof(modes[0]); i++)
		if (strcmp(argv[1], modes[i].name) == 0)
			return modes[i].run(argc - 1, argv + 1);
	return 2;
}
EOF_PEER
}

# ---- C. Plays ---------------------------------------------------------------

# Starts an origin that plays the SCRIPT, or those on standard input; sets
# $origin and $origin_port: origin NAME [SCRIPT] [-a ADDRESS [-p PORT]]
origin() {
	origin_name=$1
	shift
	[ ! -f "$origin_name.1" ] || rm -f "$origin_name".[0-9]*
	case ${1--} in
	-*) "$peer" origin "$@" "$origin_name" > .origin ;;
	*)
		origin_script=$1
		shift
		"$peer" origin "$@" "$origin_name" > .origin <<END
$origin_script
END
		;;
	esac
	read -r origin_says < .origin || fail "no origin $*"
	origin_is "$@"
}

# The origin that says "PORT PID" is the one that is meant: origin_is [OPTION...]
origin_is() {
	origin_port=${origin_says% *}
	echo "${origin_says#* }" >> .pids
	case " $* " in
	*" -a "*:*) origin="[::1]:$origin_port" ;;
	*" -a "*) origin=$2:$origin_port ;;
	*) origin=127.0.0.1:$origin_port ;;
	esac
}

# Puts addresses in the place of %O, %p and %P, from standard input.
addresses() {
	sed -e "s|%O|${origin-}|g" -e "s|%p|${origin_port-}|g" \
	    -e "s|%P|$proxy|g"
}

# Plays the SCRIPT, which begins with a small letter, against the proxy, or the
# one on standard input there or at WHERE: client NAME [SCRIPT | WHERE]
client() {
	client_at=$proxy
	case ${2-} in
	[a-z]*)
		printf '%s\n' "$2" > "$1.script"
		client_plays "$1" < "$1.script"
		;;
	*)
		client_at=${2-$proxy}
		client_plays "$1"
		;;
	esac
}

client_plays() {
	"$peer" client "$client_at" "$1" "${origin-}" "${origin_port-}" "$proxy"
}

# The same in the background, where standard input is not that of a job.
client_bg() {
	[ ! -f "$1.end" ] || rm -f "$1" "$1".*
	{ client "$@" <&3 & } 3<&0
	echo $! >> .pids
}

# N connections of one client, each with this STEP, which may have its number as @,
# then 50 at a time with the other; they stay until there is the file NAME.over, and
# then each 50th has more: many N NAME 'STEP [ ; STEP]' [STEPS]
many() {
	FIRST=$3 THEN=${4-} awk -v n="$1" -v name="$2" 'BEGIN {
		split(ENVIRON["FIRST"], step, " ; ")
		while (i++ < n) {
			first = step[1]
			gsub(/@/, i, first)
			print (i > 1 ? "dial ; " : "") first
			while (step[2] != "" && (i % 50 == 0 || i == n) && k < i)
				print "over " ++k " ; " step[2]
		}
		print "touch " name ".ready ; await " name ".over"
		for (i = 1; ENVIRON["THEN"] != "" && i <= n; i += 50)
			print "over " i " ; " ENVIRON["THEN"] }' |
		{ patience 30000; client_bg "$2"; }
	"$peer" await 50000 "$2.ready" > /dev/null ||
		fail "$1 connections: $(cat "$2.end")"
}

# Steps of clients from here on may wait so many milliseconds.
patience() {
	PEER_MS=$1
	export PEER_MS
}

# An origin that answers very many requests: GET .../N with N bytes.
load_origin() {
	rm -f far far.asked
	spawn origin.out "$peer" load far
	wait_for 5 '[ -s far ]' || fail "no origin"
	origin_port=$(cat far)
}

# Sets $origin and $origin_port to where nobody listens.
nobody() {
	origin_port=$("$peer" nobody 1) || fail "cannot free a port"
	origin=127.0.0.1:$origin_port
}

# The same to a port that does not answer: deaf [-a ADDRESS [-p PORT]]
# shellcheck disable=SC2120 # some tests say an address
deaf() {
	deaf_says=$("$peer" deaf "$@" deaf) ||
		skip "cannot make a port that does not answer"
	echo "${deaf_says#* }" >> .pids
	origin_port=${deaf_says% *}
	origin=127.0.0.1:$origin_port
}

# The same to an origin that sends back what comes, on very many connections.
echoes() {
	echoes_says=$("$peer" echo) || fail "no echo"
	echo "${echoes_says#* }" >> .pids
	origin_port=${echoes_says% *}
	origin=127.0.0.1:$origin_port
}

# Waits until the client or connection NAME has come to its end.
ended() {
	"$peer" await 20000 "$1.end" > /dev/null || fail "$1 does not end"
}

# Looks at what was seen, by "check", "judge", "want" or "last" of the peer.
look() {
	look_how=$1
	shift
	"$peer" "$look_how" -t "${play_title-}" -o "${origin-}" \
	    -p "${origin_port-}" -x "$proxy" -L "${log_from:-1}" \
	    -E "${err_from:-1}" "$@" || fail "$(cat .why)"
}

# Holds the checks on standard input against what is seen by the clients NAME...,
# by the origin NAME, in the log, on standard error, until they hold or time is up.
seen() {
	look check seen "$@"
}

got() {
	look check got "$1"
}

logged() {
	look check -l "${log-log}" log
}

said() {
	look check -e "${err-err}" err
}

# A plain request must be served, now: served [ADDRESS]
served() {
	look judge -x "${1-$proxy}" -w
}

# A play, and those that lines `== TITLE' begin in it; -n: without the request
# after each.  See the top of this file.
play() {
	play_probe=-w
	if [ "$1" = -n ]; then
		play_probe=
		shift
	fi
	[ -n "$proxy_pid" ] || start_proxy
	play_plain -t "$1"
	while [ -f "p$((plays + 1)).title" ]; do
		if [ -f "p$((plays + 1)).shell" ]; then
			play_one
		else
			play_plain
		fi
	done
}

# The next of them, and all behind it that need no shell: by one process.
play_plain() {
	# shellcheck disable=SC2086 # one or none
	"$peer" plays -o "${origin-}" -p "${origin_port-}" -x "$proxy" $play_probe \
	    "$@" $((plays + 1)) > .plays || fail "$(cat .why)"
	{ read -r play_says && IFS= read -r play_title; } < .plays || return 0
	# shellcheck disable=SC2086 # words
	set -- $play_says
	while [ $# -gt 3 ]; do
		origin_name=$1
		origin_port=$2
		origin_says="$2 $3"
		origin=127.0.0.1:$2
		shift 3
	done
	log_from=$1
	err_from=$2
	plays=$3
}

# The next of them.
play_one() {
	plays=$((plays + 1))
	p=p$plays
	IFS= read -r play_title < $p.title
	[ ! -f $p.bad ] || fail "$(cat $p.bad)"
	play_options=
	[ ! -f $p.options ] || read -r play_options < $p.options
	if [ -f $p.origin ]; then
		# shellcheck disable=SC2086 # options are words
		"$peer" begin log err $play_options "o$plays" \
		    < $p.origin > .plays || fail "no origin"
		read -r log_from err_from origin_says < .plays
		origin_name=o$plays
		# shellcheck disable=SC2086
		origin_is $play_options
	else
		"$peer" begin log err > .plays
		read -r log_from err_from < .plays
	fi
	play_clients=
	if [ -f "$p.run" ]; then
		play_run
	else
		client "c$plays" < /dev/null
	fi
	# shellcheck disable=SC2086 # clients are words
	look judge $play_probe "$plays" $play_clients
}

# What is to be done, in its order.
play_run() {
	while read -r play_what play_who play_rest; do
		case $play_what in
		front)
			[ -f "$p.client" ] || : > "$p.client"
			client "c$plays" < "$p.client"
			;;
		begin)
			client_bg "$play_who" < "$p.$play_who.client"
			play_clients="$play_clients $play_who"
			;;
		ends) ends "$play_who" "$play_rest" ;;
		do) eval "$play_who $play_rest" ||
			fail "$play_title: $play_who $play_rest" ;;
		esac
	done < "$p.run"
}

# A client that is over has ended like this: came_to NAME END
came_to() {
	read -r came_end < "$1.end"
	[ "$came_end" = "$2" ] || fail "${what-}: $1: $came_end"
}

# The connections of clients must end like this: ends NAME... ERE
ends() {
	"$peer" ends "$@" > .ends || fail "${what-}: $(cat .ends)"
}

# ---- D. Helpers of several parts --------------------------------------------

# The limits of the binary under test: a head fits in $buffer, a request line
# in $line_max, of fields in $fields_max.
read_limits() {
	buffer=$("$proxy_bin" -V | sed -n 's/^buffer \([0-9]*\).*/\1/p')
	buffer=${buffer:-32768}
	# The most that one read of a whole buffer takes.
	room_max=$("$proxy_bin" -V | sed -n 's/^head \([0-9]*\).*/\1/p')
	room_max=${room_max:-$buffer}
	line_max=$((buffer / 4 > 8192 ? buffer / 4 : 8192))
	[ $line_max -lt $((buffer - 1024)) ] || line_max=$((buffer - 1024))
	fields_max=$((buffer / 32 < 400 ? buffer / 32 : 400))
}

# True on builds whose memory and system calls say nothing: $special says which.
sanitized() {
	case "${EMULATOR:+emulated} $cflags $cc" in
	emulated*) special="an emulated machine" ;;
	*sanitize*) special="a sanitizer build" ;;
	*) return 1 ;;
	esac
}

have_ipv6() {
	address_here ::1
}

# A request that must be refused with a status, and the connection closed without
# a byte to the origin: refused STATUS TEXT
refused() {
	play "request $2" <<END
	reply  200 | evil
	client send $2 ; eof
	sees~  ^HTTP/1.1 $1
	sees~  ^Proxy-Status: proxy-ID; error=
	sees~  ^Connection: close$
	sees~  ^($1) [A-Z][-A-Za-z ]*: .
	sees~  ^-- end (eof|reset)
	sees#  1 ^HTTP/
	gets!~ .
	log    ^127.0.0.1 - - \[DATE\] "[^"]*" ($1) [0-9]+ "[^" ]+" "[^" ]+" up=0 .* end=[a-z]+ why="
	log!   ^[^1]
END
}

# The same command for each of the texts: each COMMAND TEXT...
each() {
	each_do=$1
	shift
	for each_text; do
		# shellcheck disable=SC2086 # the command may have words
		$each_do "$each_text"
	done
}

# Processor time that the proxy, or another process, has used, in hundredths of
# a second: processor_time [PID]
processor_time() {
	set -- "${1-$proxy_pid}"
	if read -r processor_stat 2> /dev/null < "/proc/$1/stat"; then
		# shellcheck disable=SC2086 # words
		set -- ${processor_stat##*) }
		echo $((${12} + ${13}))
	else
		ps -o time= -p "$1" |
		    awk -F '[:-]' '{ for (i = 1; i <= NF; i++) s = s * 60 + $i
		    print s * 100 }'
	fi
}

# The children of the proxy, or of another process, one a line: children [PID]
children() {
	set -- "${1-$proxy_pid}"
	if [ -r "/proc/$1/task/$1/children" ]; then
		children_now=
		read -r children_now < "/proc/$1/task/$1/children"
		# shellcheck disable=SC2086 # words
		[ -z "$children_now" ] || printf '%s\n' $children_now
	else
		ps -A -o ppid= -o pid= | awk -v of="$1" '$1 == of { print $2 }'
	fi
}

# True if the proxy has so many, which are then $children: has_children N
has_children() {
	# shellcheck disable=SC2046 # several
	set -- "$1" $(children)
	children_n=$1
	shift
	children="$*"
	[ $# = "$children_n" ]
}

# A build that asks us instead of the system.  Names in .test have the addresses of
# $NAME_ADDRESSES, those of them that begin with "slow" get no answer as long as
# somebody waits for it.  With $NAMES all names are ours, and each look-up leaves a
# line in that file.  It is $LATER seconds later.  Time limits (HEAD_MS) are as the
# environment says.  With $CALLS the names of functions of the walks, as they run, go
# to the file calls.  While there are such files: fork-fails, walk-slow (to open a
# directory takes long), walk-halted (it does not end), walk-fails (none can be read
# to its end), peers-halted (sockets take no byte), words-filled (others fill standard
# error). With $NONLOCAL_BIND sockets are bound to any address.
write_names() {
	cat > "$work/names.c" <<'EOF_NAMES'
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#define _TIME_BITS 64
#define _DEFAULT_SOURCE 1
#include <sys/types.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <netinet/in.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int
names_ours(const char *host)
{
	const char *file = getenv("NAMES");
	FILE *f;

	if (host == NULL || file == NULL)
		return host != NULL && strstr(host, ".test") != NULL;
	if (strpbrk(host, "ghijklmnopqrstuvwxyzGHIJKLMNOPQRSTUVWXYZ") == NULL ||
	    (f = fopen(file, "a")) == NULL)
		return 0;
	fprintf(f, "%s\n", host);
	return fclose(f) == 0;
}

static int
names_lookup(const char *host, const char *port, const struct addrinfo *hints,
    struct addrinfo **found)
{
	struct addrinfo numeric, **tail = found;
	pid_t asker = getppid();
	char list[1000], *address;

	if (!names_ours(host))
		return getaddrinfo(host, port, hints, found);
	if (strncmp(host, "slow", 4) == 0 && strstr(host, ".test") != NULL)
		while (getppid() == asker)
			(void)poll(NULL, 0, 100);
	if (strncmp(host, "late", 4) == 0)
		(void)poll(NULL, 0, 500);
	if (strcmp(host, "crash.test") == 0)
		_exit(7);
	memset(&numeric, 0, sizeof(numeric));
	numeric.ai_socktype = SOCK_STREAM;
	numeric.ai_flags = AI_NUMERICHOST;
	strncpy(list, getenv("NAME_ADDRESSES"), sizeof(list) - 1);
	for (address = list; *address != '\0'; ) {
		size_t n = strcspn(address, " ");
		char *next = address + n + (address[n] == ' ');

		address[n] = '\0';
		if (getaddrinfo(address, port, &numeric, tail) != 0)
			return EAI_FAIL;
		tail = &(*tail)->ai_next;
		address = next;
	}
	return *found == NULL ? EAI_NONAME : 0;
}

/* At 127.0.0.99 no local port is left. */
static int
names_bind(int fd, const struct sockaddr *address, socklen_t len)
{
	const struct sockaddr_in *in = (const struct sockaddr_in *)address;

	if (address->sa_family == AF_INET &&
	    in->sin_addr.s_addr == htonl(0x7f000063)) {
		errno = EADDRINUSE;
		return -1;
	}
	if (bind(fd, address, len) == 0)
		return 0;
	return errno == EADDRNOTAVAIL && getenv("NONLOCAL_BIND") != NULL ? 0 : -1;
}

static time_t
names_time(time_t *t)
{
	const char *later = getenv("LATER");
	time_t now = time(NULL) + (later != NULL ? atol(later) : 0);

	if (t != NULL)
		*t = now;
	return now;
}

static pid_t
names_fork(void)
{
	if (access("fork-fails", F_OK) == -1)
		return fork();
	errno = EAGAIN;
	return -1;
}

static DIR *
names_fdopendir(int fd)
{
	int turns = 0;

	if (access("walk-slow", F_OK) == 0)
		(void)poll(NULL, 0, 3);
	while (access("walk-halted", F_OK) == 0 && turns++ < 10000)
		(void)poll(NULL, 0, 3);
	return fdopendir(fd);
}

static struct dirent *
names_readdir(DIR *directory)
{
	int saved = errno;

	if (access("walk-fails", F_OK) == 0) {
		errno = EOVERFLOW;
		return NULL;
	}
	errno = saved;
	return readdir(directory);
}

/* Fills the pipe that is standard error. */
static void
names_fill(void)
{
	static const char words[4096];
	int fd = open("/dev/fd/2", O_WRONLY | O_NONBLOCK);

	while (write(fd, words, sizeof(words)) > 0)
		;
	(void)close(fd);
}

static ssize_t
names_write(int fd, const void *from, size_t n)
{
	struct stat status;

	if (fd == STDERR_FILENO && access("words-filled", F_OK) == 0)
		names_fill();
	if (access("peers-halted", F_OK) == -1 || fstat(fd, &status) == -1 ||
	    !S_ISSOCK(status.st_mode))
		return write(fd, from, n);
	errno = EAGAIN;
	return -1;
}

static int
names_ms(const char *limit, int usual)
{
	const char *ms = getenv(limit);

	return ms != NULL ? atoi(ms) : usual;
}

#undef fork
#define fork names_fork
#define write names_write
#define getaddrinfo names_lookup
#define bind names_bind
#define time(t) names_time(t)
#define fdopendir names_fdopendir
#define readdir names_readdir
EOF_NAMES
	{
		# All but the one that a variable begins with.
		sed -n -e '/ IDLE_MS /d' -e 's/^#define \([A-Z_]*_MS\) \([0-9]*\)$/#define \1 names_ms("\1", \2)/p' \
		    "$here/proxy.c" 2> /dev/null
		echo '#include "proxy.c"'
		write_walked
	} >> "$work/names.c"
}

# Starts the build with our names: start_names ADDRESS... [-- OPTION...]
start_names() {
	NAME_ADDRESSES=
	while [ $# -gt 0 ] && [ "$1" != -- ]; do
		NAME_ADDRESSES="$NAME_ADDRESSES${NAME_ADDRESSES:+ }$1"
		shift
	done
	[ $# = 0 ] || shift
	our_names
	unset NAMES
	start_proxy "$@"
}

# True if loopback has this address, and its port if given: ADDRESS [-p PORT]
address_here() {
	address_says=$("$peer" origin -a "$@" try 2> /dev/null < /dev/null) &&
		kill "${address_says#* }"
}

# Where a second address of the machine's loopback is, or skips.
second_address() {
	for second in 127.0.0.2 ::1; do
		address_here $second && return
	done
	skip "loopback has one address only"
}

# A deaf port or an origin at the second address, and at the same port of
# 127.0.0.1 the origin o with the script on standard input:
# twins deaf|origin NAME
twins() {
	cat > o.script
	twins_says=$("$peer" "$1" -a "$second" "$2" < /dev/null) ||
		skip "no $1 at $second"
	echo "${twins_says#* }" >> .pids
	origin o -a 127.0.0.1 -p "${twins_says% *}" < o.script
}

# The proxy of this test is that build.
surrounded() {
	need_source
	built "$work/names"
	proxy_bin=$work/names
}

# The same, and it asks us for all names and notes them in the file
# "names"; they are at 127.0.0.1 unless $NAME_ADDRESSES says otherwise.
our_names() {
	surrounded
	NAMES=names
	NAME_ADDRESSES=${NAME_ADDRESSES-127.0.0.1}
	export NAMES NAME_ADDRESSES
}

# Starts that build, in place of one that runs: start_ruled OPTION...
start_ruled() {
	[ -z "$proxy_pid" ] || stop_proxy
	our_names
	start_proxy "$@"
}

# The same with the rules on standard input, in the file "rules".
start_rules() {
	cat > rules
	start_ruled -f rules "$@"
}

# The last line of the log must match each of these: last_line ERE...
last_line() {
	look last "$@"
}

# These rules must be wrong, and each ERE must be said: wrong RULES ERE...
wrong() {
	wrong_rules=$1
	printf '%b' "$wrong_rules" > rules
	shift
	check_rules
	[ $status = 2 ] || fail "$wrong_rules: exit status $status"
	for wrong_ere; do
		grep -E "^proxy: $wrong_ere" errors > /dev/null ||
			fail "$wrong_rules: says $(head -c 300 errors)"
	done
}

# These must be right: right RULES
right() {
	printf '%b' "$1" > rules
	check_rules
	[ $status = 0 ] || fail "$1: $(cat errors)"
}

# An origin that answers all requests alike, over any number of connections:
# plain_origin [NAME [-a ADDRESS]]
plain_origin() {
	plain_name=${1-plain}
	[ $# = 0 ] || shift
	origin "$plain_name" 'replies 200 | ok' "$@"
}

# One request, up to its line in the log; the answer is in the file a:
# asks METHOD URL ['FIELDS\n']
asks() {
	look want - "$@"
}

# True if a GET of the URL gets this status: gives STATUS URL ['FIELDS\n']
gives() {
	asks GET "$2" "${3-}"
	read -r gives_line < a
	case $gives_line in
	"HTTP/1.1 $1 "*) ;;
	*) return 1 ;;
	esac
}

# Rules are read anew; soon a GET of the URL gets this status:
# reread STATUS URL ['FIELDS\n']
reread() {
	kill -HUP "$proxy_pid"
	# shellcheck disable=SC2034 # the condition below has them
	reread_status=$1 reread_url=$2 reread_fields=${3-}
	wait_for 5 'gives $reread_status "$reread_url" "$reread_fields"' ||
		fail "after HUP $2: $(head -n 1 a), not $1"
}

# One request that must get this status, and a line in the log that matches the
# EREs: want STATUS METHOD URL [FIELDS\n [ERE...]]
want() {
	look want "$@"
}

# The value of Proxy-Authorization for a login, and all of that field.
basic() {
	printf 'Basic %s' "$(printf '%s' "$1" | "$peer" base64)"
}

login() {
	printf 'Proxy-Authorization: %s\\n' "$(basic "$1")"
}

# An address of this machine, or skips; clients come from there.  To a proxy at
# another address they are not local, as all are that come from elsewhere.
need_me() {
	me=$("$peer" myself) || skip "this machine has no address but loopback"
	PEER_FROM=$me
	export PEER_FROM
}

need_second_loopback() {
	address_here 127.0.0.2 || skip "no 127.0.0.2 here"
}

# What -T says of each row on standard input, `URL WORDS = STATUS ACCESS ROUTE',
# of which the end may be missing: tries [OPTION...]
tries() {
	cat > tries.rows
	while IFS= read -r tries_row; do
		run_proxy "$@" -T "${tries_row%% = *}"
		tries_got="$status "
		while IFS= read -r tries_line; do
			case $tries_line in
			'	access: '* | '	route: '*)
				tries_line=${tries_line#*: }
				tries_by=${tries_line#* (}
				tries_by=${tries_by%%: *}
				tries_got="$tries_got${tries_line%% (*} "
				[ "$tries_by" = "$tries_line" ] ||
					tries_got="$tries_got$tries_by "
				;;
			esac
		done < out
		case $tries_got in
		"${tries_row#* = } "*) ;;
		*) fail "$tries_row: has $tries_got$(cat errors)" ;;
		esac
	done < tries.rows
}

# The file of users that the tests of logins have.
people() {
	printf '# user:password\n\nalice:wonder\nbob:a:b%%41\n' > people
	printf 'j\303\274rgen:gr\303\274n\ncarol:x\neve: pass word #1\n' >> people
	chmod 600 people
}

# A TLS greeting for a server, as text for a script: hello [NAME [N [PAD]]];
# with N bytes in a first record and the rest in a second, unless N is 0; with
# -N bytes in each record if N is below 0; with PAD bytes of padding before the
# name.
hello() {
	awk -v name="${1-}" -v first="${2-0}" -v pad="${3-0}" '
	function num(v, bytes,   hex) {
		for (hex = ""; bytes > 0; bytes--) {
			hex = sprintf("%02x", v % 256) hex
			v = int(v / 256)
		}
		return hex
	}
	BEGIN {
		for (i = 32; i < 127; i++)
			code[sprintf("%c", i)] = i
		n = length(name)
		for (i = 1; i <= n; i++)
			letters = letters num(code[substr(name, i, 1)], 1)
		if (n > 0)
			extensions = num(0, 2) num(n + 5, 2) num(n + 3, 2) \
			    num(0, 1) num(n, 2) letters
		if (pad > 0)
			extensions = num(21, 2) num(pad, 2) num(0, pad) extensions
		extensions = "000b00020100" extensions "000a00080006001d00170018"
		body = "0303"
		for (i = 0; i < 32; i++)
			body = body num(i * 7 + 3, 1)
		body = body "00" "0006c02fc030000a" "0100" \
		    num(length(extensions) / 2, 2) extensions
		all = "01" num(length(body) / 2, 3) body
		n = length(all) / 2
		if (first < 0) {
			rest = all
			for (all = ""; rest != ""; rest = substr(rest, 2 * i + 1)) {
				i = length(rest) / 2 > -first ? -first : length(rest) / 2
				all = all "160301" num(i, 2) substr(rest, 1, 2 * i)
			}
		} else if (first > 0)
			all = "160301" num(first, 2) substr(all, 1, 2 * first) \
			    "160301" num(n - first, 2) substr(all, 2 * first + 1)
		else
			all = "160301" num(n, 2) all
		for (i = 1; i < length(all); i += 2)
			printf "\\x%s", substr(all, i, 2)
	}'
}

# Private memory of the proxy in KiB.
private_memory() {
	for memory_file in smaps_rollup smaps; do
		[ -r "/proc/$proxy_pid/$memory_file" ] || continue
		awk '/^Private/ { sum += $2 } END { print sum + 0 }' \
		    "/proc/$proxy_pid/$memory_file"
		return
	done
}

need_memory() {
	sanitized && skip "the memory of $special says nothing"
	[ -n "$(private_memory)" ] || skip "no /proc/PID/smaps"
	[ "$(private_memory)" -gt 0 ] || skip "/proc/PID/smaps knows nothing"
}

# Lets strace look at the proxy that starts next.
need_calls() {
	sanitized && skip "$special says nothing"
	have strace || skip "no strace"
	strace -D -o strace.try true 2> /dev/null ||
		skip "strace may not trace, or has no -D"
	proxy_wrap="strace -D -o all.calls"
}

# In a play: the calls from here on, until the client has made the file done,
# go to the file calls, but for what is written to the log.
count_calls() {
	count_from=$(($(wc -l < all.calls) + 1))
	touch counted
	comes "done"
	tail -n "+$count_from" all.calls > calls
	logs=$(grep -c '^write(1, "127' calls)
	grep -v '^write(1, "127' calls > calls~
	mv calls~ calls
}

# How many of them are of these kinds: calls ERE; of others: calls -v ERE
calls() {
	case $1 in
	-v) grep -v -c -E "^($2)\\(" calls ;;
	*) grep -c -E "^($1)\\(" calls ;;
	esac
}

# A page of the proxy's own, into the file page: page PATH
page() {
	client page "send GET $1 HTTP/1.1\nHost: $proxy\n\n ; answer"
}

# A proxy with a cache in $T/cache: start_cache [options]
start_cache() {
	start_proxy -c "$T/cache" "$@"
}

# What is in the cache; temporary files too.
entries() {
	find "$T/cache" -type f ! -name CACHEDIR.TAG ! -name unswept
}

# There is nothing in it.
nothing_stored() {
	wait_for 5 '[ -z "$(entries)" ]' ||
		fail "${what-}: in the cache there is $(entries)"
}

# Nor is there anything half-done.
nothing_left() {
	wait_for 5 '[ -z "$(find cache -name "tmp*")" ]' ||
		fail "${what-}: left: $(find cache -name 'tmp*')"
}

# So many requests have reached the origin.
asked() {
	asked_n=0
	while [ -f "$origin_name.$((asked_n + 1))" ]; do
		asked_n=$((asked_n + 1))
	done
	[ "$asked_n" = "$1" ] ||
		fail "${what-}: the origin was asked $asked_n times, not $1"
}

# Builds into $work what only some tests need, once for all of them:
# built_once NAME WRITER FLAG...
built_once() {
	once_name=$1
	once_writer=$2
	shift 2
	if [ ! -f "$work/$once_name.status" ] &&
	    mkdir "$work/$once_name.lock" 2> /dev/null; then
		"$once_writer" > "$work/$once_name.c"
		build "$work/$once_name" "$work/$once_name.c" -O0 "$@"
	fi
	built "$work/$once_name"
}

# The program of unit tables.
built_tables() {
	# shellcheck disable=SC2086 # one or none
	built_once tables write_tables_unit ${EMULATOR:+-O1}
}

# proxy.c with -Os and the smallest buffers, by musl-gcc where that is.
built_small() {
	linked_cc=$cc
	! have musl-gcc || linked_cc=musl-gcc
	if [ ! -f "$work/small.o.status" ] &&
	    mkdir "$work/small.lock" 2> /dev/null; then
		$linked_cc -Os -DBUFFER_SIZE=4096 -c -o "$work/small.o~" \
		    "$here/proxy.c" 2> "$work/small.o.errors" &&
			mv "$work/small.o~" "$work/small.o"
		touch "$work/small.o.status"
	fi
	built "$work/small.o"
}

# Links that: linked FLAG...
linked() {
	need_source
	built_small
	$linked_cc "$@" "$work/small.o" 2> cc.out
}

# Fails if the proxy uses much processor time in the next second, or in MS
# milliseconds more than LIMIT hundredths of a second: rests WHEN [MS LIMIT]
rests() {
	rests_before=$(processor_time)
	"$peer" sleep "${2-1000}"
	rests_used=$(($(processor_time) - rests_before))
	[ "$rests_used" -lt "${3-30}" ] ||
		fail "used $rests_used/100 s of processor time, $1"
}

# ---- E. Unit programs -------------------------------------------------------

# What a unit program begins with: proxy.c with another main.  Bytes can end
# right before a page that can't be touched; there are three such places.
#
# The program reads rows,  KIND INPUT [| INPUT ...] = WANT  or  KIND:MORE ...
# A function row_KIND() says what it makes of each input, with its bytes right
# before such a page; that must be WANT.  Escapes are those of plays; others
# stay as they are.
write_unit_head() {
	cat > "$work/unit.h" <<'EOF_UNIT'
#define main proxy_main
#include "proxy.c"
#undef main
#ifdef FUZZ	/* has another main */
#define main unit_main
#endif
#include <ctype.h>
#include <sys/mman.h>

enum { PAGES = 8 * 65536, ROW_MAX = 1 << 19 };

#define COUNT(table) (sizeof(table) / sizeof((table)[0]))

/* What the program knows: checks to run by name, and kinds of rows. */
extern const struct unit_table {
	const char *name;		/* the last one has none */
	void (*run)(void);		/* a check, or NULL */
	void (*row)(struct text in);	/* says what it makes of in */
} units[];

static int failures;
static char said[ROW_MAX];	/* by a row */
static char more[1024];		/* what stands behind its kind's colon */

static void
unit_print(const char *s, const char *end)
{
	size_t i;

	for (i = 0; s[i] != '\0' && i < 200; i++)
		printf(s[i] < ' ' || s[i] > '~' ? "\\x%02x" : "%c",
		    (unsigned char)s[i]);
	printf("%s", end);
}

static void
unit_fail(const char *what, const char *input, const char *why, long long got)
{
	if (failures++ >= 20)
		return;
	unit_print(what, ": ");
	unit_print(input, " | ");
	unit_print(why, ": ");
	printf("%lld\n", got);
}

/* Memory for n bytes that ends at a guard. */
static char *
guarded(int place, size_t n)
{
	static char *ends[3];

	if (ends[place] == NULL) {
		int zero = open("/dev/zero", O_RDWR);
		char *p = mmap(NULL, PAGES, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE, zero, 0);

		if (p == MAP_FAILED ||
		    mprotect(p + PAGES - 65536, 65536, PROT_NONE) == -1)
			exit(77);
		ends[place] = p + PAGES - 65536;
	}
	return ends[place] - n;
}

/* The n bytes of s, right before a guard. */
static struct text
at_guard(int place, const char *s, size_t n)
{
	char *p = guarded(place, n);

	memmove(p, s, n);
	return text_cut(p, n);
}

static struct text
string_at_guard(const char *s)
{
	return at_guard(0, s, strlen(s));
}

/* A head of one field, whose value lies right before a guard. */
static struct head *
field_at_guard(const char *name, struct text value)
{
	static struct head h;
	size_t n = strlen(name);

	value = at_guard(0, value.at, value.len);
	h.at = memcpy(guarded(0, n + value.len), name, n);
	h.n = 0;
	head_add(&h, text_cut(h.at, n), value);
	return &h;
}

/* A copy of it that stays when the guards get something else, until the next. */
static struct text
kept(struct text in)
{
	static char copy[ROW_MAX];

	memmove(copy, in.at, in.len);
	copy[in.len] = '\0';
	return text_cut(copy, in.len);
}

/* The part of *rest up to the next ">" between blanks; that goes behind it. */
static struct text
part_next(struct text *rest)
{
	struct text part = *rest;
	size_t i;

	for (i = 0; i < part.len; i++)
		if (part.at[i] == '>' && (i == 0 || part.at[i - 1] == ' ') &&
		    (i + 1 == part.len || part.at[i + 1] == ' ')) {
			*rest = text_from(part, i + 1 + (i + 1 < part.len));
			return text_cut(part.at, i - (i > 0));
		}
	*rest = text_of("");
	return part;
}

/* What a row says. */
static void
say_row(const char *format, ...)
{
	size_t n = strlen(said);
	va_list args;

	va_start(args, format);
	(void)vsnprintf(said + n, sizeof(said) - n, format, args);
	va_end(args);
}

/* The same: bytes, escaped as rows have them. */
static void
say_text(struct text t)
{
	for (; t.len > 0; t = text_from(t, 1))
		if (text_starts(t, "\r\n")) {
			say_row("\\n");
			t = text_from(t, 1);
		} else
			say_row(*t.at == '\\' ? "\\\\" :
			    *t.at < ' ' || *t.at > '~' ? "\\x%02x" : "%c",
			    (unsigned char)*t.at);
}

/* Undoes the escapes in s up to end; returns how many bytes that makes. */
static size_t
unescape(const char *s, const char *end, char *to)
{
	static const char from[] = "lrts0\\", bytes[] = "\n\r\t \0\\";
	char *start = to;

	while (s < end) {
		char c = s + 1 < end && *s == '\\' ? s[1] : ' ';
		const char *f = strchr(from, c), *p;
		size_t len, times;

		if (f != NULL) {
			*to++ = bytes[f - from];
			s += 2;
		} else if (c == 'n') {
			*to++ = '\r';
			*to++ = '\n';
			s += 2;
		} else if (c == 'x') {
			*to++ = (char)(hex_value(s[2]) << 4 | hex_value(s[3]));
			s += 4;
		} else if (c == '{') {
			times = strtoul(s + 2, NULL, 10);
			p = strchr(s, ':') + 1;
			s = strchr(p, '}') + 1;
			for (; times > 0; times--) {
				len = unescape(p, s - 1, to);
				to += len;
			}
		} else
			*to++ = *s++;
	}
	return (size_t)(to - start);
}

/* One input of a row. */
static void
row_try(const struct unit_table *u, const char *s, const char *end,
    const char *want)
{
	static char bytes[ROW_MAX];
	size_t n = unescape(s, end, bytes), len = strlen(want);

	said[0] = '\0';
	u->row(at_guard(0, bytes, n));
	if (strncmp(said, want, len) == 0 &&
	    (said[len] == '\0' || strncmp(said + len, " at ", 4) == 0))
		return;
	if (failures++ < 20)
		printf("%s%s%s %.*s = %s, not %s\n", u->name,
		    more[0] ? ":" : "", more, (int)(end - s), s, said, want);
}

/* One row. */
static void
row_run(char *line)
{
	const struct unit_table *u = units;
	char *s = line + strcspn(line, " "), *end = strchr(line, '\0'), *p;
	char *colon = line + strcspn(line, ": "), *want = end;

	for (p = strstr(s, " = "); p != NULL; p = strstr(p + 1, " = ")) {
		end = p;
		want = p + 3;
	}
	more[0] = '\0';
	if (colon < s)
		more[unescape(colon + 1, s, more)] = '\0';
	while (u->name != NULL && (u->row == NULL ||
	    strlen(u->name) != (size_t)(colon - line) ||
	    memcmp(u->name, line, (size_t)(colon - line)) != 0))
		u++;
	if (u->name == NULL) {
		unit_fail("no such kind", line, "", 0);
		return;
	}
	s += s < end && strncmp(s, " | ", 3) != 0;
	*end = '\0';
	while ((p = strstr(s, " | ")) != NULL) {
		row_try(u, s, p, want);
		s = p + 3;
	}
	row_try(u, s, end, want);
}

int
main(int argc, char **argv)
{
	static char line[ROW_MAX];
	const struct unit_table *u;
	int i, n = 0;

	(void)proxy_main;
	clock_read();
	now.wall = 1795315380;
	while (fgets(line, sizeof(line), stdin) != NULL) {
		line[strcspn(line, "\n")] = '\0';
		if (line[0] != '\0' && line[0] != '#') {
			row_run(line);
			n++;
		}
	}
	for (i = 1; i < argc; i++)
		for (u = units; u->name != NULL; u++)
			if (strcmp(argv[i], u->name) == 0 && u->run != NULL) {
				u->run();
				n++;
			}
	if (n == 0)
		unit_fail("no row, no check", "", "", argc);
	return failures > 0;
}
EOF_UNIT
}

# Runs checks of the unit program, which the first test that comes here builds,
# and those of the rows on standard input: unit [CHECK...]
unit() {
	need_source
	built_tables
	"$work/tables" "$@" > unit.out 2>&1
	status=$?
	[ $status != 77 ] || skip "no memory or disk for it"
	[ $status = 0 ] || fail "status $status: $(head -n 5 unit.out)"
}

# Holds the rows on standard input against what proxy.c makes of them.
rows() {
	unit
}

# ---- 1. System and limits ---------------------------------------------------

test_signals_interrupt() { # calls that a signal interrupts are made again
	sanitized && skip "$special says nothing"
	have strace || skip "no strace"
	strace -D -o strace.try -e inject=read:error=EINTR:when=999 true \
	    2> /dev/null || skip "strace can't inject"
	proxy_wrap="strace -D -f -o calls -e inject=read,write,pread64,pwrite64:error=EINTR:when=3+3"
	start_proxy -c cache
	origin o \
	    'reply 200 Cache-Control: max-age=99\nContent-Length: 300000 ; fill 300000'
	for n in 1 2 3 4 5; do
		client a$n \
		    'send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; until \n\n ; skip 300000'
		has a$n.end open
	done
	log_from=1
	logged <<'END'
~ miss=stored
~ hit=fresh
~ hit=fresh
~ hit=fresh
~ hit=fresh
END
	play -n 'a tunnel' <<'END'
	origin until ping ; send pong ; fill 100000 ; close
	ask    CONNECT %O
	client send ping ; until pong ; skip 100000 ; eof
	log    CONNECT .* 200 100004 .* end=server
END
	grep EINTR calls > /dev/null || skip "strace injects nothing"
	stop_proxy
	# A worker reaps its helper, which is no zombie for ever.
	proxy_wrap=
	start_proxy -j 2
	workers 2
	proxy_pid=${workers%% *}
	wait_for 5 'has_children 1' || fail "no helper: $children"
	spawn waits strace -p "$proxy_pid" -e inject=wait4:error=EINTR:when=1
	"$peer" lines 5000 + waits attached || skip "strace can't attach"
	helper=$children
	kill -KILL "$helper"
	wait_for 5 'has_children 1 && [ "$children" != "$helper" ]' ||
		fail "of helper $helper and the next there are: $children"
}

# ---- 2. Vocabulary ----------------------------------------------------------

# Its words are what all parts below speak of; style_limits is about its limits.

# ---- 3. Small tools ---------------------------------------------------------

# What the pure parts of proxy.c make of bytes; every split of every message
# must give the same result.  Rows:
#
#   number:MAX N = N or none             print N = same
#   wall SECONDS = DATE
#   escape TEXT = TEXT                   base64 BYTES = "TEXT"
#   list MEMBERS = COUNT LAST
#   local ADDRESS = yes or no
#   address HOST = ADDRESS [guarded] [loopback], or none
#   target:METHOD TARGET = 200 HOST PORT PATH, or STATUS
#   request HEAD = 200 FRAMING, or STATUS
#   response:METHOD HEAD = STATUS FRAMING, or refused
#   body:FRAMING BODY = PAYLOAD, whole and N more, or broken (and N left)
#
# A FRAMING is none, close, chunked, or a length; "cut" chunks tell what is left.
tables_parts() {
	cat <<'EOF_UNIT'

/* The status that a verdict stands for; 200 for 1, 0 for 0. */
static int
status_of(int verdict)
{
	return verdict == 1 ? 200 : verdict == 0 ? 0 :
	    refusals[-verdict].status;
}

/* The method that stands behind a kind's colon. */
static enum method
method_of(void)
{
	return more[0] == 'C' ? METHOD_CONNECT : more[0] == 'H' ? METHOD_HEAD :
	    more[0] == 'O' ? METHOD_OPTIONS : METHOD_GET;
}

static void
row_number(struct text in)
{
	uint64_t value = 12345;

	if (number_parse(in, strtoull(more, NULL, 10), &value))
		say_row("%llu", (unsigned long long)value);
	else
		say_row(value == 12345 ? "none" : "touched");
}

static void
row_print(struct text in)
{
	char *to = guarded(1, in.len);

	say_row(number_print(to, strtoull(kept(in).at, NULL, 10)) ==
	    to + in.len && memcmp(to, in.at, in.len) == 0 ? "same" : "other");
}

static void
row_wall(struct text in)
{
	time_t wall = now.wall;

	now.wall = strtoll(kept(in).at, NULL, 10);
	say_row("%s", date_now(DATE_HTTP));
	if (strlen(date_now(DATE_LOG)) != strlen("01/Jan/1970:00:00:00 +0000"))
		say_row(", the log's %s", date_now(DATE_LOG));
	now.wall = wall;
}

static void
row_escape(struct text in)
{
	struct buffer *b = buffer_take();

	buffer_escape(b, in, 100, false);
	say_row("%.*s", (int)buffer_len(b), b->data + b->start);
	buffer_give(&b);
}

static void
row_base64(struct text in)
{
	char coded[64];

	base64_encode(in.at, in.len, coded);
	say_row("\"%s\"", coded);
}

static void
row_list(struct text in)
{
	struct text member, last = text_of("");
	int n = 0;

	for (; list_next(&in, &member); n++)
		last = member;
	say_row("%d%s%.*s", n, last.len > 0 ? " " : "", (int)last.len, last.at);
}

/* Who is on this machine; a socket that is not bound has the address 0.0.0.0. */
static void
row_local(struct text in)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	struct address peer;

	(void)address_parse(in, 4242, &peer);
	say_row(peer_is_local(fd, &peer) ? "yes" : "no");
	(void)address_parse(text_of("10.0.0.9"), 4242, &peer);
	if (peer_is_local(-1, &peer))
		say_row(", without a socket");
	(void)close(fd);
}

/* True if the built-in lines keep a client from elsewhere from there. */
static bool
is_guarded(const struct address *a)
{
	struct exchange x;
	struct request q;
	struct view v;

	if (rules_now == NULL)
		(void)rules_read();
	memset(&x, 0, sizeof(x));
	memset(&q, 0, sizeof(q));
	(void)address_parse(text_of("10.0.0.9"), 0, &x.peer);
	x.request = &q;
	exchange_view(&x, NULL, a, &v);
	return rule_judge(rules_now->first[GROUP_ACCESS], &v) == TRUTH_YES;
}

static void
row_address(struct text in)
{
	struct address a;

	if (!address_parse(in, 80, &a)) {
		say_row("none");
		return;
	}
	say_row("%s%s%s", address_words(&a), is_guarded(&a) ? " guarded" : "",
	    address_is_loopback(&a) ? " loopback" : "");
}

/* The longest line of the log ends like every other. */
static void
check_line(void)
{
	static char quotes[BUFFER_ROOM] = "User-AgentReferer", name[300];
	size_t names = strlen(quotes);
	struct text value = text_cut(quotes + names, BUFFER_ROOM - names - 1);
	static struct account user;
	static struct rule rule = { .where = name, .action = ACTION_DENY };
	static struct exchange x;
	struct text t;

	memset(quotes + names, '"', sizeof(quotes) - names - 1);
	memset(name, '"', sizeof(name) - 1);
	user.user = text_of(name);
	x.record = (struct record){ .user = &user, .rule = &rule,
		.refusal = REFUSE_CUT_SHORT };
	x.peer.family = x.record.server.family = AF_INET6;
	memset(x.peer.octets, 0xff, 16);
	memset(x.record.server.octets, 0xff, 16);
	x.request = request_new(&x, RESERVED);
	x.request->name = x.request->uri = value;
	x.request->head.at = quotes;
	head_add(&x.request->head, text_cut(quotes, 10), value);
	head_add(&x.request->head, text_cut(quotes + 10, 7), value);
	x.up.payload = x.down.payload = UINT64_MAX;
	log_lines.start = log_lines.end = CHUNK_ROOM;
	log_exchange(&x);
	t = buffer_text(&log_lines);
	if (text_find(t, '\n') + 1 != t.len || t.len < BUFFER_ROOM / 2)
		unit_fail("line", "", "", (long long)t.len);
	request_drop(&x.request);
}

static void
row_target(struct text in)
{
	struct target target;
	int status = status_of(target_parse(in, method_of(), &target));

	say_row("%d", status);
	if (status == 200)
		say_row("%s%.*s %u%s%.*s", target.host.len > 0 ? " " : " no",
		    (int)target.host.len, target.host.at, target.port,
		    target.path.len > 0 ? " " : "", (int)target.path.len,
		    target.path.at);
	if (host_is_valid(at_guard(1, "a\0b", 3), false))
		say_row(", NUL");
}

static void
say_framing(enum framing framing, uint64_t length)
{
	static const char *const words[] = { [FRAMING_NO_BODY] = "none",
		[FRAMING_CLOSE] = "close", [FRAMING_CHUNKED] = "chunked" };

	if (framing == FRAMING_LENGTH)
		say_row(" %llu", (unsigned long long)length);
	else
		say_row(" %s", words[framing]);
}

/* A head's end is found at its last byte, from every start. */
static void
say_end(struct text head, bool lenient)
{
	size_t n, seen;

	for (n = 0; n <= head.len; n++) {
		seen = 0;
		if ((n < head.len && head_find(at_guard(1, head.at, n), &seen,
		    lenient) != 0) || head_find(at_guard(1, head.at, head.len),
		    &seen, lenient) != (int)head.len)
			say_row(", end %d", (int)n);
	}
}

/* A request, and (not with :once) each of its bytes replaced by each other. */
static void
row_request(struct text in)
{
	static struct request r;
	static struct response answer;
	struct text head = kept(in);
	int c, found, status = status_of(request_parse(in, &r));
	size_t at, seen;
	char copy[256];

	say_row("%d", status);
	if (status == 200)
		say_framing(r.framing, r.length);
	say_end(head, false);
	if (more[0] != '\0')	/* once */
		return;
	memcpy(copy, head.at, head.len);
	for (at = 0; at < head.len; copy[at] = head.at[at], at++)
		for (c = 0; c < 256; c++) {
			copy[at] = (char)c;
			seen = 0;
			found = head_find(at_guard(0, copy, head.len), &seen,
			    false);
			if (found <= 0)
				continue;
			in = at_guard(0, copy, (size_t)found);
			status = status_of(request_parse(in, &r));
			if (status != 200 && (status < 400 || status > 599))
				say_row(", %d for \\x%02x", status, c);
			if (status == 200 && (c < 9 || c == 127))
				say_row(", 200 for \\x%02x", c);
			in = at_guard(0, copy, (size_t)found);
			if (response_parse(in, METHOD_GET, &answer) == 1)
				say_row(", a response by \\x%02x", c);
		}
}

/* What a PROXY header says of a client, and how many bytes are left. */
static int
header_verdict(const char *s, size_t n, struct address *client)
{
	memset(client, 0, sizeof(*client));
	return header_parse(at_guard(0, s, n), client);
}

/*
 * True if each beginning of n bytes and more needs more, or has the verdict of
 * the whole.
 */
static bool
header_splits(const char *s, size_t len, size_t n)
{
	struct address whole, part;
	int verdict = header_verdict(s, len, &whole), got = 0;

	for (; n <= len && got == 0; n++)
		got = header_verdict(s, n, &part);
	return got == verdict && memcmp(&part, &whole, sizeof(part)) == 0 &&
	    got <= (int)n - 1;
}

/* A PROXY header; each byte replaced by each other: no split matters. */
static void
row_header(struct text in)
{
	struct text head = kept(in);
	char copy[1024];
	struct address client;
	size_t at, first = 1;	/* the beginning that has a verdict */
	int c, got = header_verdict(head.at, head.len, &client);

	if (got <= 0)
		say_row("%s", got == 0 ? "more" : refusals[-got].words);
	else
		say_row("%s, %d left", address_words(&client),
		    (int)head.len - got);
	memcpy(copy, head.at, head.len);
	if (!header_splits(copy, head.len, 1))
		say_row(", split");
	while (first < head.len &&
	    header_verdict(copy, first, &client) == 0)
		first++;
	/* Beginnings before the byte are as they were. */
	for (at = 0; at < head.len && at < 64; copy[at] = head.at[at], at++)
		for (c = 0; c < 256; c++) {
			copy[at] = (char)c;
			if (!header_splits(copy, head.len,
			    at < first ? at + 1 : first))
				say_row(", split by \\x%02x", c);
		}
}

/* A response; each byte replaced by each other: what is left is clean. */
static void
row_response(struct text in)
{
	static struct response r;
	struct text head = kept(in);
	size_t at, seen, n;
	char copy[256];
	int c, got;

	if (response_parse(in, method_of(), &r) == 1) {
		say_row("%d", r.status);
		say_framing(r.framing, r.length);
	} else
		say_row("refused");
	say_end(head, true);
	memcpy(copy, head.at, head.len);
	for (at = 0; at < head.len; copy[at] = head.at[at], at++)
		for (c = 0; c < 256; c++) {
			copy[at] = (char)c;
			seen = 0;
			got = head_find(at_guard(0, copy, head.len), &seen, true);
			if (got > 0)
				got = response_parse(at_guard(0, copy,
				    (size_t)got), method_of(), &r);
			for (n = 0; got == 1 && n < r.head.n; n++)
				if (!text_is_token(field_name(&r.head, n)) ||
				    !text_is_clean(field_value(&r.head, n)))
					say_row(", unclean by \\x%02x", c);
		}
}

/* A line in a head: what a request with it gets, and how a response fares. */
static void
row_line(struct text in)
{
	static const char *const starts[] = {
		"POST http://a/ HTTP/1.1\r\nHost: a\r\n",
		"HTTP/1.1 200 OK\r\nX-First: 1\r\n" };
	static struct request request;
	static struct response response;
	struct text line = kept(in), head;
	char copy[1024];
	size_t i, n, seen;
	int verdict;

	for (i = 0; i < COUNT(starts); i++) {
		n = strlen(starts[i]);
		memcpy(copy, starts[i], n);
		memcpy(copy + n, line.at, line.len);
		memcpy(copy + n + line.len, "\r\n\r\n", 4);
		seen = 0;
		verdict = head_find(text_cut(copy, n + line.len + 4), &seen, i == 1);
		head = at_guard(0, copy, verdict > 0 ? (size_t)verdict : 0);
		if (verdict > 0)
			verdict = i == 0 ? request_parse(head, &request) :
			    response_parse(head, METHOD_GET, &response);
		if (i == 0)
			say_row("%d", status_of(verdict));
		else
			say_row(verdict == 1 ? " passes" : " refused");
	}
}

/* What became of the bytes of one message. */
struct outcome {
	char bytes[4096];	/* its payload */
	size_t n, over;		/* over: bytes left behind it */
	bool whole, broken;
};

/* n bytes more arrive at b; all of it ends at the guard again. */
static void
arrive(struct buffer *b, const char *s, size_t n)
{
	size_t len = buffer_len(b), start = BUFFER_ROOM - len - n;

	memmove(b->data + start, b->data + b->start, len);
	memcpy(b->data + start + len, s, n);
	b->start = start;
	b->end = BUFFER_ROOM;
}

/* Takes the framing off a message that arrives in pieces. */
static void
decode_pieces(enum framing framing, uint64_t length, struct text s,
    const size_t *cut, size_t cuts, struct outcome *o)
{
	struct buffer *b = (struct buffer *)(void *)guarded(0, sizeof(*b));
	struct flow f;
	size_t at = 0, i;

	memset(o, 0, sizeof(*o));
	memset(b, 0, offsetof(struct buffer, data));
	b->start = b->end = BUFFER_ROOM;
	flow_start(&f, framing, framing, length);
	for (i = 0; i <= cuts + 1; i++) {
		size_t end = i < cuts ? cut[i] : s.len;

		arrive(b, s.at + at, end - at);
		at = end;
		flow_decode(&f, b, i > cuts);
		memcpy(o->bytes + o->n, b->data + b->start, f.ready);
		o->n += f.ready;
		buffer_drop(b, f.ready);
		f.ready = 0;
	}
	o->over = buffer_len(b) - f.trailer;
	o->whole = f.whole;
	o->broken = f.broken;
}

/* How a body came out that was cut there: into to, which has 5000 bytes. */
static void
body_print(struct text s, const size_t *cut, size_t cuts, char *to)
{
	static struct outcome o;
	enum framing framing = isdigit((unsigned char)more[0]) ? FRAMING_LENGTH :
	    strcmp(more, "none") == 0 ? FRAMING_NO_BODY :
	    strcmp(more, "close") == 0 ? FRAMING_CLOSE : FRAMING_CHUNKED;

	decode_pieces(framing, strtoull(more, NULL, 10), s, cut, cuts, &o);
	(void)snprintf(to, 5000, "%.*s, %s%s", (int)o.n, o.bytes,
	    o.whole ? "whole" : "broken", o.whole == o.broken ? " and not" : "");
	if (o.whole || framing == FRAMING_LENGTH || strcmp(more, "cut") == 0)
		(void)snprintf(to + strlen(to), 40, " and %d %s", (int)o.over,
		    o.whole ? "more" : "left");
}

/* Whole, byte by byte, and cut in two places: the same. */
static void
row_body(struct text in)
{
	static char whole[5000], other[5000];
	size_t cut[256], i, k;

	in = kept(in);
	body_print(in, cut, 0, whole);
	say_text(text_of(whole));
	for (i = 0; i < in.len; i++)
		cut[i] = i;
	body_print(in, cut, in.len, other);
	if (strcmp(whole, other) != 0)
		say_row(", byte by byte");
	for (i = 0; i <= in.len; i++)
		for (k = i; k <= in.len; k++) {
			cut[0] = i;
			cut[1] = k;
			cut[2] = k;
			body_print(in, cut, 3, other);
			if (strcmp(whole, other) != 0)
				say_row(", cut at %d and %d", (int)i, (int)k);
		}
}

/*
 * What a chunked body is, told without states (RFC 9112 section 7.1): 1 and
 * where it ends, 0 if it may go on, -1 if it is none; payload has what is of
 * it until then.
 */
static int
chunks_judge(const char *s, size_t n, size_t *end, char *payload, size_t *sum)
{
	size_t at = 0, i, lf;
	unsigned long long size;

	for (*sum = 0;; at += 2) {
		for (i = at; i < n && isxdigit((unsigned char)s[i]); i++)
			continue;
		if (i - at > 16 || (i == at && i < n))
			return -1;
		size = strtoull(s + at, NULL, 16);
		if (size > INT64_MAX)
			return -1;
		while (i < n && (s[i] == ' ' || s[i] == '\t'))
			i++;
		if (i < n && s[i] == ';')
			while (i < n && (s[i] == '\t' ||
			    (unsigned char)s[i] >= ' '))
				i++;
		if ((i < n && s[i] != '\r') || (i + 1 < n && s[i + 1] != '\n'))
			return -1;
		if (i + 2 > n)
			return 0;
		at = i + 2;
		if (size == 0)
			break;
		for (; size > 0 && at < n; size--)
			payload[(*sum)++] = s[at++];
		if ((at < n && s[at] != '\r') ||
		    (at + 1 < n && s[at + 1] != '\n'))
			return -1;
		if (at + 2 > n)
			return 0;
	}
	/* Trailer lines: a name, a colon, and nothing that can't be seen. */
	for (i = at; i < n; i = lf + 1) {
		for (lf = i; lf < n && s[lf] != '\n'; lf++)
			continue;
		if (lf == n)
			return 0;
		if (lf == i || s[lf - 1] != '\r')
			return -1;
		if (lf == i + 1)
			break;
	}
	if (i == n)
		return 0;
	*end = lf + 1;
	for (; at < i; at = lf + 1) {
		bool named = false;

		for (lf = at; s[lf] != '\r' || s[lf + 1] != '\n'; lf++) {
			char c = s[lf];

			if (c == ':' && !named && lf > at)
				named = true;
			else if (!named && !isalnum((unsigned char)c) &&
			    (c == '\0' || !strchr("!#$%&'*+-.^_`|~", c)))
				return -1;
			else if (c == 127 || (c != '\t' && c >= 0 && c < ' '))
				return -1;
		}
		if (!named)
			return -1;
		lf++;
	}
	return 1;
}

/* Each byte behind each beginning of a body, a request behind it. */
static void
check_chunks(void)
{
	static const char *const starts[] = { "", "0", "00", "5", "5 ", "0\t",
		"5;a", "0;a=\"b", "5\r", "0\r", "0 \r", "0;a\r", "5\r\n",
		"5\r\nhell", "5\r\nhello", "5\r\nhello\r", "5\r\nhello\r\n",
		"5\r\nhello\r\n0", "5\r\nhello\r\n0\r",
		"5\r\nhello\r\n0\r\n", "0\r\n", "0\r\n\r", "0\r\nA",
		"0\r\nA:", "0\r\nA:b\r", "0\r\nA:b\r\n", "0\r\nA:b\r\n\r",
		"0000000000000000", "7FFFFFFFFFFFFFFF", "8", NULL };
	static const char *const rests[] = { "GET / HTTP/1.1\r\n\r\n",
		"\r\nGET / HTTP/1.1\r\n\r\n", NULL };
	static struct outcome o;
	const char *const *start, *const *rest;
	char s[100], payload[100];
	size_t n, cut, end, sum;
	int c, verdict;

	for (start = starts; *start != NULL; start++)
		for (rest = rests; *rest != NULL; rest++)
			for (c = 1; c < 256; c++) {
				snprintf(s, sizeof(s), "%s%c%s", *start, c,
				    *rest);
				n = strlen(s);
				verdict = chunks_judge(s, n, &end, payload,
				    &sum);
				for (cut = 0; cut < strlen(*start) + 3; cut++) {
					decode_pieces(FRAMING_CHUNKED, 0,
					    text_of(s), &cut, 1, &o);
					if (o.whole != (verdict == 1) ||
					    o.broken == o.whole ||
					    o.n != sum || memcmp(o.bytes,
					    payload, sum) != 0 ||
					    (o.whole && o.over != n - end))
						unit_fail("chunks", *start,
						    *rest, c);
				}
			}
}

/* Undoes the chunks at s; returns the payload's length, -1 if they are bad. */
static long
chunks_undo(const char *s, size_t n, char *to)
{
	const char *end = s + n;
	long sum = 0;

	for (;;) {
		char *p;
		size_t size = strtoul(s, &p, 16);

		if (p == s || memcmp(p, "\r\n", 2) != 0)
			return -1;
		s = p + 2;
		if (size == 0)
			break;
		if ((size_t)(end - s) < size + 2 ||
		    memcmp(s + size, "\r\n", 2) != 0)
			return -1;
		memcpy(to + sum, s, size);
		sum += (long)size;
		s += size + 2;
	}
	return end - s == 2 && memcmp(s, "\r\n", 2) == 0 ? sum : -1;
}

static char encode_body[BUFFER_SIZE * 4];

/* At most `in` bytes of the n of a body arrive, of which *at have come. */
static void
encode_arrive(struct conn *from, size_t n, size_t *at, size_t in)
{
	size_t room, part = n - *at < in ? n - *at : in;

	if (part == 0)
		return;
	if (from->in == NULL)
		from->in = buffer_take();
	buffer_compact(from->in);
	room = buffer_room(from->in);
	part = part < room ? part : room;
	memcpy(from->in->data + from->in->end, encode_body + *at, part);
	from->in->end += part;
	*at += part;
}

/*
 * A body of n bytes goes through flow_encode(), arriving `in` bytes and
 * leaving `out` bytes at a time.
 */
static bool
encode_whole(enum framing from_framing, enum framing to_framing, size_t n,
    size_t in, size_t out)
{
	static char left[BUFFER_SIZE * 24], undone[BUFFER_SIZE * 4];
	struct conn from, to;
	struct flow f;
	size_t at = 0, sent = 0, idle = 0, part;

	conn_clear(&from);
	conn_clear(&to);
	flow_start(&f, from_framing, to_framing, n);
	while (!(f.done && to.out == NULL) && idle < 10) {
		encode_arrive(&from, n, &at, in);
		flow_decode(&f, from.in, at == n && from_framing ==
		    FRAMING_CLOSE);
		if (!f.done)
			idle = flow_encode(&f, &from, &to, UINT64_MAX) ? 0 : idle + 1;
		if (to.out == NULL)
			continue;
		part = buffer_len(to.out) < out ? buffer_len(to.out) : out;
		memcpy(left + sent, to.out->data + to.out->start, part);
		sent += part;
		buffer_drop(to.out, part);
		if (buffer_len(to.out) == 0)
			buffer_give(&to.out);
		idle = 0;
	}
	buffer_give(&from.in);
	buffer_give(&to.out);
	if (!f.done || f.payload != n || (to_framing == FRAMING_CHUNKED ?
	    chunks_undo(left, sent, undone) != (long)n : sent != n))
		return false;
	return memcmp(to_framing == FRAMING_CHUNKED ? undone : left, encode_body,
	    n) == 0;
}

static void
encode_try(enum framing from, enum framing to, size_t n, size_t in, size_t out)
{
	char what[100];

	if (encode_whole(from, to, n, in, out))
		return;
	(void)snprintf(what, sizeof(what), "%d bytes from %d by %d to %d by %d",
	    (int)n, (int)from, (int)in, (int)to, (int)out);
	unit_fail("encoding", what, "", 0);
}

static void
check_encoding(void)
{
	static const size_t pieces[] = { 1, 7, 100, BUFFER_ROOM / 2 - 1,
		BUFFER_ROOM / 2, BUFFER_ROOM / 2 + 20, BUFFER_ROOM - 40,
		BUFFER_ROOM };
	static const enum framing framings[] = { FRAMING_LENGTH, FRAMING_CLOSE,
		FRAMING_CHUNKED };
	size_t i, n, in, out;

	for (i = 0; i < sizeof(encode_body); i++)
		encode_body[i] = (char)('a' + i % 26);
	/*
	 * All of 2 framings to 3 by 8 pieces to 8; more than a buffer leaves
	 * or comes byte by byte only beside whole buffers.
	 */
	for (i = 0; i < 2 * 3 * 64; i++) {
		in = i / 6 % 8;
		out = i / 48;
		for (n = 1; n < BUFFER_ROOM * 3; n += BUFFER_ROOM * 3 / 8 - 5)
			if (n < BUFFER_ROOM || in * out > 0 || in + out == 7)
				encode_try(framings[i % 2],
				    framings[i / 2 % 3], n, pieces[in],
				    pieces[out]);
	}
	/* All ways in which a full buffer may be the last. */
	for (n = BUFFER_ROOM - 64; n < BUFFER_ROOM + 64; n++)
		for (out = 1; out < 40; out += 13)
			encode_try(FRAMING_LENGTH, FRAMING_CHUNKED, n,
			    BUFFER_ROOM, BUFFER_ROOM - 40 + out);
}

/* A socket that is connected to itself has not found a server. */
static void
check_self(void)
{
	struct address a = { .family = AF_INET, .octets = { 127, 0, 0, 1 } };
	struct sockaddr_storage storage;
	socklen_t len = address_export(&a, &storage);
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	struct conn c;

	conn_clear(&c);
	if (fd == -1 || bind(fd, (struct sockaddr *)&storage, len) == -1)
		unit_fail("self", "no port", "", 0);
	a.port = address_bound(fd).port;
	close(fd);
	if (!conn_connect(&c, &a, &a) ||
	    conn_connect_error(&c, &a) != ECONNREFUSED)
		unit_fail("self", "it counts as connected", "", 0);
	conn_close(&c, false);
}
EOF_UNIT
}

test_unit_numbers() { # numbers: digits only, range-checked
	rows <<'END'
number:0 0 = 0
number:7 7 | 00000000000000000000000000000007 = 7
number:65535 65535 = 65535
number:9223372036854775807 9223372036854775807 = 9223372036854775807
number:18446744073709551615 18446744073709551615 = 18446744073709551615
number:0 1 = none
number:7 8 = none
number:65535 65536 = none
number:9223372036854775807 9223372036854775808 = none
number:18446744073709551615 18446744073709551616 | 99999999999999999999 = none
number:99 | +1 | -1 | \s1 | 1\s | 0x1 | 1e1 | 1\l | \xb2 | a | : | / = none
print 0 | 9 | 10 | 99 | 100 | 65535 | 18446744073709551615 = same
END
}

test_unit_dates() { # dates as RFC 9110 has them
	rows <<'END'
wall 0 = Thu, 01 Jan 1970 00:00:00 GMT
wall 784111777 = Sun, 06 Nov 1994 08:49:37 GMT
wall 0 = Thu, 01 Jan 1970 00:00:00 GMT
wall 951782399 = Mon, 28 Feb 2000 23:59:59 GMT
wall 951782400 = Tue, 29 Feb 2000 00:00:00 GMT
wall 1795315380 = Sun, 22 Nov 2026 02:43:00 GMT
wall 2147483647 = Tue, 19 Jan 2038 03:14:07 GMT
END
}

test_unit_texts() { # escapes, base64, lists
	rows <<'END'
escape = -
escape a/b?c=d&e = a/b?c=d&e
escape a b = a%20b
escape "\\ = %22%5C
escape \n\t\x7f\x80\xff = %0D%0A%09%7F%80%FF
escape %41 = %41
base64 = ""
base64 f = "Zg=="
base64 fo = "Zm8="
base64 foo = "Zm9v"
base64 foob = "Zm9vYg=="
base64 \xff\xfe\xfd:\xfb = "//79Ovs="
list | , = 0
list a = 1 a
list \s, a ,, b\t, | "x,y", b = 2 b
list "x\\",y" ,c = 2 c
list "x,y = 1 "x,y
list a,"x\\ = 2 "x\
END
}

test_unit_addresses() { # addresses: read, printed, guarded
	rows <<'END'
local 127.0.0.1 | 127.9.9.9 | ::1 | 0.0.0.0 | ::ffff:127.0.0.1 = yes
local 10.0.0.9 | :: | 128.0.0.1 | 2001:db8::1 = no
address 127.0.0.1 | ::ffff:127.0.0.1 | ::ffff:7f00:1 = 127.0.0.1:80 guarded loopback
address 127.255.0.9 = 127.255.0.9:80 guarded loopback
address 0.0.0.0 = 0.0.0.0:80 guarded
address 10.0.0.1 | ::ffff:10.0.0.1 = 10.0.0.1:80
address 128.0.0.1 = 128.0.0.1:80
address 169.254.0.1 = 169.254.0.1:80 guarded
address 169.253.0.1 = 169.253.0.1:80
address 224.0.0.1 = 224.0.0.1:80 guarded
address 223.255.255.255 = 223.255.255.255:80
address 255.255.255.255 = 255.255.255.255:80 guarded
address ::1 = [::1]:80 guarded loopback
address :: = [::]:80 guarded
address ::2 = [::2]:80
address fe80::1 = [fe80::1]:80 guarded
address febf::1 = [febf::1]:80 guarded
address fec0::1 = [fec0::1]:80
address ff02::1 = [ff02::1]:80 guarded
address 2001:DB8::A = [2001:db8::a]:80
address | localhost | 127.0.0.1\s | [::1] | ::1% | 256.0.0.1 | 1.2.3.4.5 | 1:2:3:4:5:6:7:8:9 = none
END
}

# A build whose clock is sixteen years ahead.
test_start_later() { # after 2038: dates, ages and the log are right
	LATER=500000000
	export LATER
	our_names
	start_cache
	play 'a miss and a hit' <<'END'
	reply  200 Cache-Control: max-age=600 | ok
	ask    / = 200; fwd=uri-miss
	ask    / = 200; hit; ttl=
	sees#  2 ^Date: [A-Z][a-z][a-z], [0-9]* [A-Z][a-z]* 20[45][0-9] [0-9:]* GMT
	sees#  1 ^Age: [0-9]
END
	has log '/20[45][0-9]:[0-9:]* [+-]'
	touch -t 205001010000 file.later 2> /dev/null ||
		skip "the system's files end before 2050; all else is right"
	start_proxy -e "answer 200 file $T/file.later"
	want 200 GET http://x.test/
}

# ---- 4. Buffers and requests ------------------------------------------------

test_limit_board() { # the buffers that README has for boards take what the web sends
	surrounded
	"$proxy_bin" -V | grep -x "buffer $board_buffer" > /dev/null ||
		skip "CFLAGS say other buffers"
	play "$board_buffer" <<'END'
	reply  200 X-A: \{15700:a} | ok
	ask    /\{7960:a} X-A: \{7700:a} = 200 OK | ok
END
}

# For $proxy_wrap: a program has so many KiB of memory.
limited() {
	# shellcheck disable=SC3045 # without it memory is not short
	ulimit -v "$1"
	shift
	exec "$@"
}

test_log_memory() { # short of memory: each client gets an answer, and each its line
	sanitized && skip "$special takes all memory"
	proxy_wrap='limited 20000' start_proxy
	# Requests in two parts, all at once.
	awk 'BEGIN {
		while (n++ < 250)
			print (n > 1 ? "dial ; " : "") "send GET / HTTP/1.1\\nHost: %P\\nConnection: close\\n"
		print "stall 300"
		for (n = 1; n <= 250; n++)
			print "over " n " ; send \\n ; eof" }' | client answers
	has answers '^HTTP/1.1 200'
	grep '^HTTP/1.1 503' answers > /dev/null || [ "$buffer" -lt 65536 ] ||
		fail "memory was not short"
	[ "$(grep -c -e '^HTTP/1.1 200' -e '^HTTP/1.1 503' answers)" = 250 ] ||
		fail "answers: $(sort answers | uniq -c | tr '\n' ' ')"
	counts 250 log ''
	served
}

test_resources_slow_readers() { # who does not read costs two buffers at most
	start_proxy
	need_memory
	served
	before=$(private_memory)
	play 'one each way' <<'END'
	reply  200 Content-Length: 1073741824
	origin stuff 1073741824 ; touch stuffed1 ; await over
	origin next
	origin head ; await over
	a: send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; await over
	do comes stuffed1
	b: send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 1073741824\n\n
	b: stuff 1073741824 ; touch stuffed2 ; await over
	do comes stuffed2
	do after=$(private_memory)
	do touch over
END
	# Two buffers for each of the two, and two pages of other things.
	[ $((after - before)) -le $(((buffer * 4 + 8192) / 1024)) ] ||
		fail "$((after - before)) KiB for two exchanges"
	[ "$(cat o1.1.stuffed)" -lt 1073741824 ] || fail "all was taken"
}

# ---- 5. Conns ---------------------------------------------------------------

test_server_reuse() { # one connection for many requests; not after close, HTTP/1.0, or for a POST
	play 'from one client' <<'END'
	replies 200 | ok
	ask    /1 = 200 OK
	ask    HEAD /2 = 200 OK
	client stall 100
	ask    /3 = 200 OK
	gets   -- connection 1
	log    /1 HTTP/1.1" 200 2 .* connect=N .* end=done
END
	# HEAD's answer above has two bytes too many: they must not be taken for
	# the next answer.  Here all is well, from several clients.
	play 'from three' <<'END'
	replies 200 | ok
	a: ask /1
	a: ends open
	b: ask /1
	b: ends open
	c: ask /1
	c: ends open
	gets#  3 ^GET /1 HTTP/1.1
	gets#  1 ^-- connection
	log    http://%O/1 HTTP/1.1" 200 2 .* connect=N
	log    http://%O/1 HTTP/1.1" 200 2 .* connect=- .* server=%O end=done
	log    http://%O/1 HTTP/1.1" 200 2 .* connect=- .* server=%O end=done
	== close
	reply  200 Connection: close | ok
	origin eof
	ask    /1 = 200 OK
	ask    /2 = 200 OK
	gets   GET /1 HTTP/1.1
	gets   -- connection 2
	gets   GET /2 HTTP/1.1
	== not behind a body, which a server that did not read it takes for a request
	reply  200 | ok
	origin eof
	origin next
	reply  200 | again
	ask    /1 | hello = 200 | ok
	ask    /2 = 200 | again
	gets~  ^hello$
	gets   -- connection 2
	gets   GET /2 HTTP/1.1
	== POST
	replies 200 | ok
	ask    /1 = 200 OK
	ask    POST /2 Content-Length: 0 = 200 OK
	gets   GET /1 HTTP/1.1
	gets   -- connection 2
	gets   POST /2 HTTP/1.1
END
}

test_server_retry() { # one retry if a kept connection turns out dead
	play 'GET' <<'END'
	reply  200 | ok
	origin head ; close
	origin next
	reply  200 | again
	ask    /1 = 200 | ok
	ask    /2 = 200 | again
	gets   GET /1 HTTP/1.1
	gets   GET /2 HTTP/1.1
	gets   -- connection 2
	gets   GET /2 HTTP/1.1
	log#   2 "GET
	log    /2 HTTP/1.1" 200 5 .* end=done
	== reset instead of close
	reply  200 | ok
	origin head ; reset
	origin next
	reply  200 | again
	ask    /1 = 200 | ok
	ask    DELETE /2 = 200 | again
	gets   -- connection 2
	gets   DELETE /2 HTTP/1.1
	== only once
	reply  200 | ok
	origin head ; close
	origin next
	origin head ; close
	ask    /1 = 200 | ok
	ask    /2 = 502 Bad Gateway
	gets#  2 ^-- connection
	log    /2 HTTP/1.1" 502 .* why="
	== not on a fresh connection
	origin head ; close
	ask    /1 = 502 Bad Gateway error=connection_terminated
	sees~  ^502 Bad Gateway: .
	gets#  1 ^-- connection
	log    /1 HTTP/1.1" 502 .* server=%O end=[a-z]* why="
	== never a POST
	replies 200 | ok
	origin next
	origin head ; close
	ask    /1 = 200 | ok
	ask    POST /2 | hi = 502 Bad Gateway
	gets#  1 ^POST
	gets#  2 ^-- connection
	== not after a byte of the answer
	reply  200 | ok
	origin head ; send HTTP/1.1 2 ; close
	ask    /1 = 200 | ok
	ask    /2 = 502 Bad Gateway
	gets#  1 ^-- connection
END
}

test_server_stale() { # a kept connection that speaks or closes is not used
	play 'closed while idle' <<'END'
	reply  200 | ok
	origin close
	origin next
	reply  200 | again
	ask    /1 = 200 | ok
	client stall 200
	ask    /2 = 200 | again
	log    /2 HTTP/1.1" 200 5 .* connect=N .* end=done
	== an answer that nobody asked for
	reply  200 | ok
	origin stall 50 ; say 200 | evil ; eof ; touch closed
	origin next
	reply  200 | again
	ask    /1 = 200 | ok
	client await closed
	ask    /2 = 200 | again
	sees!~ evil
END
	# Two answers in one piece, and so that one read ends with the first one.
	full=$((room_max - 42))
	[ ${#full} = 5 ] || full=$((full + 1))
	for length in 2 $full; do
		play "an answer of $length bytes, and more behind it" <<END
	reply  200 Content-Length: $length | \{$length:x}HTTP/1.1 200 OK\nContent-Length: 4\n\nevil
	origin eof
	origin next
	reply  200 | again
	client send GET http://%O/1 HTTP/1.1\nHost: %O\n\nGET http://%O/2 HTTP/1.1\nHost: %O\n\n
	client answer ; answer
	sees   again
	sees!~ evil
END
	done
}

test_server_strays() { # what an older answer left on a kept connection is not the next one
	for stray in '0\n\n' 'ok' '\n\n' '\n0\n' 'ok\n\n' \
	    'HTTP/1.1 408 Request Timeout\nConnection: close\nContent-Length: 4\n\nevil'; do
		play "behind the next request: $stray" <<END
		reply  200 | ok
		origin head
		origin send ${stray}HTTP/1.1 200 OK\nContent-Length: 4\n\nevil
		origin eof
		origin next
		reply  200 | again
		ask    /1
		ask    /2 = 200 | again
		sees!~ (evil|^HTTP/1.1 [45])
		gets#  2 ^-- connection
		gets#  2 ^GET /2
		log#   2 "GET
		log    /2 HTTP/1.1" 200 5 .* end=done
END
	done
	for empty in '\n' '\l'; do
		play "one empty line: $empty" <<END
		origin head
		origin send ${empty}HTTP/1.1 200 OK\nContent-Length: 2\n\nok
		origin head
		origin chop 1 5 ${empty}HTTP/1.1 200 OK\nContent-Length: 4\n\ngood
		ask    /1
		ask    /2
		sees   Content-Length: 2
		sees~  ^HTTP/1.1 200 OK
		sees   good
		gets#  1 ^-- connection
END
	done
	play 'an empty line, and the end' <<'END'
	reply  200 | ok
	origin head ; send \n ; close
	origin next
	reply  200 | again
	ask    /1
	ask    /2 = 200 | again
	== two empty lines on a new connection are no answer
	origin head ; send \n\nHTTP/1.1 200 OK\nContent-Length: 4\n\nevil
	ask    /1 = 502 Bad Gateway
	sees!~ evil
	gets#  1 ^-- connection
	== asked again only once
	reply  200 | ok
	reply  408 Request Timeout\nContent-Length: 0
	origin eof
	origin next
	reply  408 Request Timeout | late
	ask    /1
	ask    /2
	sees~  HTTP/1.1 408
	sees   late
	gets#  2 ^-- connection
	log    /2 HTTP/1.1" 408 4
	== not behind an interim answer
	reply  200 | ok
	origin head ; send HTTP/1.1 103 Early\n\nodd\n\n
	ask    /1
	ask    /2
	sees   HTTP/1.1 502 Bad Gateway
	gets#  1 ^-- connection
END
}

test_server_login() { # a login of a connection (NTLM, Negotiate) serves no other client
	for scheme in NTLM Negotiate ntlm NEGOTIATE; do
		play "$scheme" <<END
		reply  200 | alice
		reply  200 | alice
		origin next
		reply  200 | nobody
		a: ask / Authorization: $scheme TlRMTVNTUAAD = 200 | alice
		a: ends open
		b: ask / = 200 | nobody
		b: sees!~ alice
END
	done
	# The server begins it, beside another way to log in.
	for offers in 'Basic realm="a, b"\nWWW-Authenticate: NTLM' \
	    'Basic realm="a, b", Negotiate'; do
		play "$offers" <<END
		reply  401 WWW-Authenticate: $offers | alice
		reply  200 | alice
		origin next
		reply  200 | nobody
		a: ask / = 401 | alice
		a: ends open
		b: ask / = 200 | nobody
END
	done
}

# ---- 6. Heads: lines and fields ---------------------------------------------

# The same for what stands behind a method: refused_get STATUS 'URL VERSION'
refused_get() {
	refused "$1" "GET $2\\nHost: %O\\n\\n"
}

test_bad_length() { # Content-Length and Transfer-Encoding
	for bad in 'Content-Length: +4' 'Content-Length: 4\nContent-Length: 5' \
	    'Content-Length: 4\nTransfer-Encoding: chunked'; do
		refused 400 "POST http://%O/ HTTP/1.1\\nHost: %O\\n$bad\\n\\nevil"
	done
	for bad in xchunked 'chunked, chunked' 'gzip, chunked' 'chunked\0'; do
		refused '(400|501)' \
		    "POST http://%O/ HTTP/1.1\\nHost: %O\\nTransfer-Encoding: $bad\\n\\n4\\nevil\\n0\\n\\n"
	done
	each 'refused 400' 'POST http://%O/ HTTP/1.0\nTransfer-Encoding: chunked\nContent-Length: 4\n\nevil' \
	    'POST http://%O/ HTTP/1.1\nHost: %O\nTransfer-Encoding : chunked\n\n4\nevil\n0\n\n' \
	    'POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length : 4\n\nevil' \
	    'POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 1x\n\nGET http://%O/evil HTTP/1.1\nHost: %O\n\n'
	evil='GET http://0.0.0.0:1/evil HTTP/1.1\nHost: x\n\n'
	length=47	# of it, with CR LF
	for request in 'OPTIONS http://%O/ HTTP/1.1\nHost: %O\nMax-Forwards: 0' \
	    'POST / HTTP/1.1\nHost: %P' 'POST http://127.0.0.1:1/ HTTP/1.1\nHost: x'; do
		play "the body of $request is no request" <<END
		client send $request\nContent-Length: $length\n\n ; stall 50
		client send $evil ; stall 50 ; shut ; eof
		sees#  1 HTTP/1.1 [2-5]
		log#   1 .
		log!   evil
END
	done
	play 'equal repeats merge' <<'END'
	origin head ; want 4 ; say 200 | ok
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 4,4\nContent-Length: 4\n\ngood
	client answer
	sees   ok
	gets   Content-Length: 4
	gets#  1 ^Content-Length
	gets   good
END
}

test_bad_fields() { # one lexer: what is no field ends the request
	for bad in 'X-A : b' ' X-A: b' 'X-A' 'X-A: b\lX-C: d' '\0'; do
		refused 400 "GET http://%O/ HTTP/1.1\\nHost: %O\\n$bad\\n\\n"
	done
	each 'refused 400' 'GET http://%O/ HTTP/1.1\n X-A: b\nHost: %O\n\n' \
	    'GET http://%O/ HTTP/1.1\nHost: %O\nX-A: b\l\l'
}

test_limit_heads() { # the longest request line, head and fields pass; one more: 414, 431
	# GET, the URL with five digits of a port, and the version.
	room=$((line_max - 36))
	play 'long' <<END
	reply  200 | ok
	ask    /\{$room:a} = 200 | ok
	gets~  ^GET /a*a HTTP/1.1$
	log    200 2 "-" "-" up=0 .* end=done
END
	refused 414 "GET http://%O/\\{$((room + 1)):a} HTTP/1.1\\nHost: %O\\n\\n"
	refused 414 "GET http://%O/\\{$((buffer * 2)):a}"
	room=$((buffer - buffer / 8 - 700))
	play 'large' <<END
	reply  200 X-A: \{$room:a} | ok
	ask    / X-A: \{$room:a} = 200 OK
	sees~  ^X-A: a*a$
	sees   ok
	gets~  ^X-A: a*a$
END
	refused 431 "GET http://%O/ HTTP/1.1\\nHost: %O\\nX-A: \\{$buffer:a}\\n\\n"
	refused 431 "GET http://%O/ HTTP/1.1\\nHost: %O\\n\\{$buffer:X-A: b\\n}"
	play 'fields' <<END
	origin head
	origin send HTTP/1.1 200 OK\nContent-Length: 2\n\{$((fields_max - 1)):X-A: b\n}\nok
	client send GET http://%O/ HTTP/1.1\nHost: %O\n\{$((fields_max - 1)):X-A: b\n}\n
	client answer
	sees   HTTP/1.1 200 OK
	sees   ok
	sees#  $((fields_max - 1)) ^X-A: b\$
	gets#  $((fields_max - 1)) ^X-A: b\$
END
	refused 431 "GET http://%O/ HTTP/1.1\\nHost: %O\\n\\{$fields_max:X-A: b\\n}\\n"
	play 'HEAD gets no page, however wrong the rest is' <<END
	client send HEAD http://%O/\{$line_max:a} HTTP/1.1\nHost: %O\n\n ; eof
	sees   HTTP/1.1 414 URI Too Long
	sees~  ^Content-Length: [1-9]
	sees!~ ^414
	log    " 414 0 .* end=done
	== an unknown version
	client send HEAD http://%O/ HTTP/2.0\nHost: %O\n\n ; eof
	sees~  ^HTTP/1.1 505
	sees!~ ^505
	== a control byte in the URL
	client send HEAD http://%O/\x01 HTTP/1.1\nHost: %O\n\n ; eof
	sees   HTTP/1.1 400 Bad Request
	sees!~ ^400
	== a line that ends in LF
	client send HEAD http://%O/ HTTP/1.1\nHost: %O\l\n ; eof
	sees   HTTP/1.1 400 Bad Request
	sees!~ ^400
END
}

# A response that must be refused: garbled TEXT
garbled() {
	play "response $1" <<END
	origin head ; send $1 ; stall 50
	ask    / = 502 Bad Gateway error=(http_protocol_error|http_response_[a-z_]*|connection_terminated)
	sees~  ^502 Bad Gateway: .
	sees!~ evil
	gets   GET / HTTP/1.1
	log    "GET http://%O/ HTTP/1.1" 502 .* server=%O end=[a-z]* why="
END
}

test_error_not_http() { # what is no HTTP response gets a 502
	each garbled 'SSH-2.0-evil\n' '\x15\x03\x01\x00\x02\x02\x28\n\n' \
	    'HTTP/1.1\n\nevil' '<html>evil</html>\n\n' 'HTTP/1.1 200 OK\nContent-Len' \
	    'HTTP/1.1 2000 OK\nContent-Length: 4\n\nevil'
	rows <<'END'
response SSH-2.0-evil\n\n | HTTP/1.1 20\n\n | HTTP/1.1 099 OK\n\n | HTTP/1.1 abc OK\n\n | HTTP/2.0 200 OK\n\n | HTTP/11.1 200 OK\n\n | http/1.1 200 OK\n\n | ICY 200 OK\n\n | \sHTTP/1.1 200 OK\n\n = refused
END
}

test_error_response_fields() { # bad fields in a response get a 502; a 407 of an origin does not pass for ours
	for bad in 'Content-Length: +4' 'Content-Length: 4\nContent-Length: 5' \
	    'Transfer-Encoding: chunked, chunked' ' X-A: b' 'X-A\0'; do
		garbled "HTTP/1.1 200 OK\\nX-First: 1\\n$bad\\n\\nevil"
	done
	garbled 'HTTP/1.1 200 O\0K\nContent-Length: 4\n\nevil'
	garbled 'HTTP/1.1 200 O\rK\nContent-Length: 4\n\nevil'
	garbled "HTTP/1.1 200 OK\\n\\{401:X-A: b\\n}Content-Length: 4\\n\\nevil"
	garbled "HTTP/1.1 200 OK\\nX-A: \\{$buffer:a}\\nContent-Length: 4\\n\\nevil"
	play 'equal repeats of Content-Length merge' <<'END'
	origin head
	origin send HTTP/1.1 200 OK\nContent-Length: 4, 4\nContent-Length: 4\n\ngood
	reply  200 | more
	ask    / = 200 OK
	sees   Content-Length: 4
	sees   good
	ask    / = 200 OK | more
	sees#  2 ^Content-Length: 4$
	== obs-text passes
	reply  200 \xe4\nX-A: \xff\tb | good
	ask    / X-A: \xe4 = 200 \xe4
	sees   X-A: \xff\x09b
	sees   good
	gets   X-A: \xe4
	== 407
	reply  407 Proxy Authentication Required\nProxy-Authenticate: Basic realm="evil" | evil
	ask    / = 502 Bad Gateway
	sees!~ (^Proxy-Authenticate|evil)
	log    "GET http://%O/ HTTP/1.1" 502 .* why="
END
}

# A head of a server that is put right and told in the trace, once:
# mended WORDS HEAD BODY
mended() {
	play -n "put right: $2" <<END
	origin head ; send HTTP/1.1 200 OK\nCache-Control: max-age=99\n$2$3
	origin close
	ask    /
	ask    /
	sees   HTTP/1.1 200 OK
	sees   X-A: b
	sees~  ^Cache-Status: proxy-ID; hit; ttl=9[0-9]$
	sees!~ (^Content-Length: 9|: identity|^X-A[ \t]|odd|evil)
	sees~  good
	gets#  1 ^GET
	log    200 4 .* end=done
	log    200 4 .* hit=fresh
	err#   1 the server's head: $1
	err#   1 the server's head
END
	sed '1,/^$/d' "$(entries)" | sed "/^$cr\$/,\$d" > stored
	has stored "^X-A: b$cr\$"
	! grep -e ' :' -e odd -e '^Content-Length' -e identity \
	    -e "[^$cr]\$" stored || fail "$2: stored as it came"
	rm -r cache/??
}

test_error_response_mended() { # what a server gets wrong, and no one can misunderstand, is put right
	cr=$(printf '\r')
	start_cache -v
	length='Content-Length: 4\n'
	mended 'LF alone' "X-A: b\\l$length\\n" good
	mended 'LF alone' "X-A: b\\n${length}\\l" good
	mended 'LF alone' 'X-A: b\lContent-Length: 4\l\l' good
	mended 'blanks before a colon' "X-A \\t : b\\n$length\\n" good
	mended 'blanks before a colon' 'X-A: b\nContent-Length : 4\n\n' good
	mended 'blanks before a colon' 'X-A: b\nTransfer-Encoding : chunked\n\n' \
	    '4\ngood\n0\n\n'
	mended 'a line without a colon' "odd\\nX-A: b\\nodd odd\\n$length\\n" good
	mended 'Transfer-Encoding: identity' \
	    "X-A: b\\nTransfer-Encoding: Identity\\n$length\\n" good
	mended 'Transfer-Encoding: identity' \
	    'Transfer-Encoding: identity\nX-A: b\nTransfer-Encoding: chunked\n\n' \
	    '4\ngood\n0\n\n'
	mended 'Content-Length beside' \
	    'X-A: b\nContent-Length: 9\nTransfer-Encoding: chunked\n\n' \
	    '4\ngood\n0\n\n'
	play 'Transfer-Encoding in HTTP/1.0: decoded, but not stored' <<'END'
	origin head ; send HTTP/1.0 200 OK\nCache-Control: max-age=99\n
	origin send Transfer-Encoding: chunked\n\n4\ngood\n0\n\n ; eof
	origin next
	reply  200 | more
	ask    /
	ask    /
	sees   good
	sees   more
	log    200 4 .* miss=framing .* end=done
END
	stop_proxy
	start_proxy
	play 'LF alone everywhere, to the close' <<'END'
	origin head ; send HTTP/1.1 200 OK\lX-A: b\l\lgood\n ; close
	ask    / = 200 OK
	sees+  X-A: b
	sees   good
	== LF alone, byte by byte
	origin head
	origin chop 1 1 HTTP/1.1 200 OK\lX-A: b\lContent-Length: 4\r\l\lgood
	ask    /
	sees   X-A: b
	sees~  ^good
	== Content-Length beside chunked: the connection is not used again
	reply  200 Transfer-Encoding: chunked\nContent-Length: 0 | 4\ngood\n0\n\n
	origin eof
	origin next
	reply  200 | more
	ask    /
	ask    /
	sees#  1 ^Content-Length
	sees   more
	gets#  2 ^-- connection
	== of answers without a body too
	origin head
	origin send HTTP/1.1 103 Early\lX-A : 103\lodd\l\lHTTP/1.1 200 OK\lX-A : 200\nContent-Length : 5\n\l
	origin head
	origin send HTTP/1.1 304 Not\lX-A : 304\nTransfer-Encoding: identity\n\l
	origin head
	origin send HTTP/1.1 204 No\lX-A : 204\nTransfer-Encoding: chunked\nContent-Length: 5\n\l
	origin eof
	ask    HEAD /
	ask    /
	ask    /
	sees   X-A: 103
	sees   HTTP/1.1 200 OK
	sees   X-A: 200
	sees+  Content-Length: 5
	sees   HTTP/1.1 304 Not
	sees+  X-A: 304
	sees   HTTP/1.1 204 No
	sees+  X-A: 204
	sees!~ (odd|identity|chunked)
	sees#  1 ^Content-Length
	log#   3 end=done
END
	# A parent that speaks HTTP is a server like others.
	stop_proxy
	origin parent \
	    'head ; send HTTP/1.0 200 OK\lX-A : b\l\l ; want 4 ; send pong ; eof'
	start_proxy -x "http://$origin"
	play -n 'a CONNECT by a parent' <<'END'
	ask    CONNECT a.example:443 = 200
	client send ping ; until pong
	sees+  X-A: b
	sees   pong
END
}

# ---- 7. Heads: requests and responses ---------------------------------------

test_unit_targets() { # the four forms of a target
	rows <<'END'
target http://a/ = 200 a 80 /
target hTTp://A.b-c_d~e:65535 = 200 A.b-c_d~e 65535
target http://a?b = 200 a 80 ?b
target http://a:/b | http://a/b#c = 200 a 80 /b
target http://a#c@d/ = 200 a 80
target http://[::1]/b = 200 ::1 80 /b
target http://[::1]:1/b = 200 ::1 1 /b
target http://a/b@c:d = 200 a 80 /b@c:d
target http://a/b?c?d/http://x@y/ = 200 a 80 /b?c?d/http://x@y/
target /a = 200 no 0 /a
target //a = 200 no 0 //a
target:OPTIONS * = 200 no 0 *
target * | http:// | http:/// | http:/ | http: | h | http://:80/ | http://a:0/ | http://a:65536/ | http://a:1:2/ | http://a:b/ | http://a@b/ | http://a:b@c/ | a\0://b/ = 400
target http://[/ | http://[]/ | http://[a]/ | http://[127.0.0.1]/ | http://[::1]a/ | http://[::1/ | http://a%41/ | http://a\\b/ | ://a/ = 400
target https://a/ | ftp://a/ = 501
target:CONNECT a:443 = 200 a 443
target:CONNECT [::1]:443 = 200 ::1 443
target:CONNECT a | a: | :1 | [::1] | a:1/ | u@a:1 | http://a:1 = 400
END
}

test_unit_requests() { # request heads, where they end, and each of their bytes replaced by each other
	get='GET http://a/ HTTP/1.1\nHost: a\n'
	post='POST http://a/ HTTP/1.1\nHost: a\n'
	rows <<END
request $get\n | GET http://a/ HTTP/1.0\n\n | X http://a/ HTTP/1.1\nhOST:\t a:8\t\s\nA:\n\n | ${get}A: \x80\xff\n\n = 200 none
request ${post}Content-Length: 7\n\n | POST http://a/ HTTP/1.1\ncontent-length:7,7 , 07\nHost: a\n\n = 200 7
request ${post}Content-Length: 9223372036854775807\n\n = 200 9223372036854775807
request ${post}Transfer-Encoding: chunked\n\n | ${post}TRANSFER-ENCODING:CHUNKED\n\n = 200 chunked
request GET http://a/ HTTP/1.1\n\n | ${get}Host: a\n\n | ${get}A : b\n\n | ${get}A: b\n c\n\n | $get: b\n\n | ${get}A\n\n | ${get}A: \x01\n\n = 400
request ${post}Content-Length: 9223372036854775808\n\n | ${post}Content-Length: 7 7\n\n | ${post}Content-Length: 7\nContent-Length: 8\n\n = 400
request ${post}Transfer-Encoding: chunked\nContent-Length: 1\n\n | POST http://a/ HTTP/1.0\nHost: a\nTransfer-Encoding: chunked\n\n = 400
request ${post}Transfer-Encoding: gzip\n\n = 501
request GET http://a/ HTTP/2.0\nHost: a\n\n = 505
request GET http://a/ HTTP/1.1\s\nHost: a\n\n | GET  http://a/ HTTP/1.1\nHost: a\n\n | \n | GET\n\n | \s\n\n | \s\s\n\n | PRI * HTTP/2.0\n\n = 400
END
}

test_unit_headers() { # PROXY headers, each of their bytes replaced by each other, in any pieces
	two='\n\n\0\nQUIT\l'
	four="$two\x21\x11\0\x0c\xc0\0\x02\x07\xc0\0\x02\x01"
	wrong='a malformed line in a PROXY header'
	long='the PROXY header is too long'
	rows <<END
header PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\n | PROXY TCP4 192.0.2.7 0.0.0.0 4711 0\n = 192.0.2.7:4711, 0 left
header PROXY TCP4 192.0.2.7 192.0.2.1 65535 80\nGET / HTTP/1.1\n\n = 192.0.2.7:65535, 18 left
header PROXY TCP6 2001:db8::7 ::1 1 80\n = [2001:db8::7]:1, 0 left
header PROXY TCP6 ::ffff:192.0.2.7 ::1 1 80\n = 192.0.2.7:1, 0 left
header PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\n = [ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535, 0 left
header PROXY UNKNOWN\n | PROXY UNKNOWN x y\n | PROXY UNKNOWN \{91:f}\n = -, 0 left
header P | PROXY | PROXY\s | PROXY TCP4 1.2.3.4 | PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\r = more
header P | PROXY | PROXY\s | PROXY TCP4 1.2.3.4 | PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\r | PROXY UNKNOWN \{91:f}\r = more
header GET / HTTP/1.1\n\n | POST | proxy TCP4 1.2.3.4 1.2.3.4 1 1\n | PROXY\n | PROXY\tTCP4 | \x16\x03\x01 | \0 | \n\nGET | \nPROXY\s | QUIT = a PROXY header was expected
header PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\l | PROXY \n | PROXY TCP4\n | PROXY TCP\n | PROXY tcp4 1.2.3.4 1.2.3.4 1 1\n | PROXY UDP4 1.2.3.4 1.2.3.4 1 1\n | PROXY unknown\n = $wrong
header PROXY TCP4 1.2.3.4 1.2.3.4 1\n | PROXY TCP4 1.2.3.4 1.2.3.4 1 1 1\n | PROXY TCP4 1.2.3.4 1.2.3.4 1 1\s\n | PROXY TCP4  1.2.3.4 1.2.3.4 1 1\n | PROXY TCP4 1.2.3.4 1.2.3.4 1 \n = $wrong
header PROXY TCP4 1.2.3.4 1.2.3.4 1 65536\n | PROXY TCP4 1.2.3.4 1.2.3.4 65536 1\n | PROXY TCP4 1.2.3.4 1.2.3.4 01 1\n | PROXY TCP4 1.2.3.4 1.2.3.4 +1 1\n | PROXY TCP4 1.2.3.4 1.2.3.4 1 1\0\n = $wrong
header PROXY TCP4 1.2.3 1.2.3.4 1 1\n | PROXY TCP4 1.2.3.256 1.2.3.4 1 1\n | PROXY TCP4 ::1 1.2.3.4 1 1\n | PROXY TCP4 1.2.3.4 ::1 1 1\n | PROXY TCP6 1.2.3.4 ::1 1 1\n | PROXY TCP6 [::1] ::1 1 1\n | PROXY TCP4 1.2.3.4\0 1.2.3.4 1 1\n | PROXY TCP4 a.example 1.2.3.4 1 1\n = $wrong
header PROXY UNKNOWN \{92:f}\n | PROXY UNKNOWN \{93:f} | PROXY TCP4 1.2.3.4 1.2.3.4 1 \{99:0}1\n = $long
header $four\x12\x67\0\x50 = 192.0.2.7:4711, 0 left
header $four\x12\x67\0\x50GET = 192.0.2.7:4711, 3 left
header $two\x21\x11\0\x10\xc0\0\x02\x07\xc0\0\x02\x01\x12\x67\0\x50\x04\0\x01\0GET = 192.0.2.7:4711, 3 left
header $two\x21\x11\x02\x08\xc0\0\x02\x07\{4:\0}\x12\x67\{510:x} = 192.0.2.7:4711, 0 left
header $two\x21\x21\0\x24\x20\x01\x0d\xb8\{11:\0}\x07\{16:\0}\x12\x67\0\x50 = [2001:db8::7]:4711, 0 left
header $two\x21\x21\0\x24\{10:\0}\xff\xff\xc0\0\x02\x07\{16:\0}\x12\x67\0\x50 = 192.0.2.7:4711, 0 left
header $two\x20\0\0\0 | $two\x20\x11\0\x0c\{12:x} | $two\x20\xff\0\x01x | $two\x21\0\0\0 | $two\x21\0\0\x05aaaaa | $two\x21\x31\0\xd8\{216:x} = -, 0 left
header \r | \n\n | $two | $two\x21 | $two\x21\x11\0 | $two\x21\x11\0\x0c | $four | $four\x12\x67\0 | $two\x20\0\0\x01 = more
header $two\x22\x11\0\x0c | $two\x11\x11\0\x0c | $two\0\0\0\0 | $two\x2f\0\0\0 = unknown PROXY version or command
header $two\x21\x12\0\x0c | $two\x21\x22\0\x24 | $two\x21\x32\0\xd8 | $two\x21\x01\0\0 | $two\x21\x41\0\0 = a PROXY header that is not for TCP
header $two\x21\x11\0\0 | $two\x21\x11\0\x0b | $two\x21\x21\0\x0c | $two\x21\x21\0\x23 = a PROXY header without an address
header $two\x21\x11\x02\x09 | $two\x20\0\xff\xff = $long
END
}

test_unit_responses() { # response heads, where they end, and each of their bytes replaced by each other
	ok='HTTP/1.1 200 OK\n'
	rows <<END
response $ok\n | HTTP/1.0 200\n\n | ${ok}Transfer-Encoding: identity\n\n | ${ok}A : b\n\n = 200 close
response HTTP/1.1 299\s\n\n = 299 close
response ${ok}Content-Length: 5\n\n | ${ok}Content-Length: 5, 5\n\n | ${ok}Transfer-Encoding: identity\nContent-Length: 5\n\n = 200 5
response HTTP/1.1 200 OK\lContent-Length: 5\l\l | ${ok}A\nContent-Length\t : 5\l\n = 200 5
response ${ok}Transfer-Encoding: chunked\n\n | ${ok}Transfer-Encoding: ,chunked,\n\n | ${ok}Content-Length: 5\nTransfer-Encoding: chunked\n\n = 200 chunked
response:HEAD ${ok}Content-Length: 5\n\n = 200 none
response:CONNECT ${ok}Content-Length: 5\n\n = 200 none
response:CONNECT HTTP/1.1 403 No\nContent-Length: 5\n\n = 403 5
response HTTP/1.1 304 No\nContent-Length: 5\n\n = 304 none
response HTTP/1.1 204 No\nTransfer-Encoding: chunked\n\n = 204 none
response HTTP/1.1 100 Go\n\n = 100 none
response ${ok}Content-Length: 5, 6\nTransfer-Encoding: chunked\n\n | ${ok}Transfer-Encoding: identity, chunked\n\n | ${ok}Content-Length: x\n\n | ${ok}Transfer-Encoding: x\n\n = refused
response $ok A: b\l\l | ${ok}A: b\r\n\n | ${ok}A: b\rB: c\n\n | $ok: b\n\n = refused
response HTTP/1.1 20 OK\n\n | HTTP/1.1 2000\n\n | HTTP/1.1  200\n\n | HTTP/1.1\t200 OK\n\n | HTTP/1.1 +20 OK\n\n | HTTP/1.1 099 OK\n\n | HTTP/2.0 200 OK\n\n | SSH-2.0-x\n\n | \n = refused
END
}

test_bad_request_line() { # request lines that are none
	each 'refused_get 400' ' http://%O/ HTTP/1.1' 'http://%O/\0 HTTP/1.1'
	each 'refused 400' 'GET\n\n' 'GET http://%O/ HTTP/1.1\lHost: %O\l\l' \
	    'GET http://%O/ HTTP/1.1\nHost: %O\l\n' \
	    'GET http://%O/ HTTP/1.1\rHost: %O\r\r\n\n'
	refused_get 505 'http://%O/ HTTP/2.0'
	a='\nHost: a\n\n'
	rows <<END
request:once GET http://a/  HTTP/1.1$a | GET http://a/ HTTP/1.1\s$a | GET http://a/ x HTTP/1.1$a | GET http://a/\x01 HTTP/1.1$a | GET http://a/\x7f HTTP/1.1$a = 400
request:once GET http://a/\n\n | \sGET http://a/ HTTP/1.1$a | GET\thttp://a/\tHTTP/1.1$a | G(T http://a/ HTTP/1.1$a | G\0T http://a/ HTTP/1.1$a | G\xe4T http://a/ HTTP/1.1$a = 400
request:once GET http://a/ http/1.1$a | GET http://a/ HTTP/1$a | GET http://a/ HTTP/1.10$a | GET http://a/ HTTP/01.1$a | GET http://a/ HTTP/+1.1$a | GET http://a/ HTTP/1.1x$a | GET http://a/ HTTPS/1.1$a = 400
request:once GET http://a/ HTTP/0.9$a = 505
END
}

test_bad_url() { # URLs that a proxy must not take
	each 'refused_get 400' 'http://a@b@%O/ HTTP/1.1' 'http:///x HTTP/1.1' \
	    'http://127.0.0.1#@%O/ HTTP/1.1' \
	    'http://127.0.0.1:0/ HTTP/1.1' 'http://%O/#\0 HTTP/1.1' 'x HTTP/1.1'
	each 'refused 400' 'CONNECT user:pw@%O HTTP/1.1\nHost: %O\n\n' \
	    'CONNECT http://%O/ HTTP/1.1\nHost: %O\n\n' \
	    'CONNECT 127.0.0.1 HTTP/1.1\nHost: x\n\n'
	refused_get 501 'ftp://%O/ HTTP/1.1'
	a='HTTP/1.1\nHost: a\n\n'
	rows <<END
request:once GET http://a\\\\@a/ $a | GET http://a/#\x7f $a | GET # $a | GET http://:80/x $a | GET http:/a/ $a | GET a:80 $a | GET * $a | CONNECT a:80#part $a = 400
request:once GET http:a $a = 400
request:once GET https://a/ $a | GET xhttp://a/ $a = 501
END
	for port in 0 65536 99999999999 18446744073709551617 -1 +80 8x 0x50 '\s'; do
		printf 'target http://127.0.0.1:%s/ = 400\ntarget:CONNECT 127.0.0.1:%s = 400\n' \
		    "$port" "$port"
	done > targets
	for host in '[::1' '::1' '[::1]x' '[x]' '[]' '[::1%25lo]' 'a b' 'a"b' \
	    'a<b' 'a\\b' 'a\0b' 'a\xe4b' 'a,b' 'a@'; do
		printf 'target http://%s:80/ = 400\ntarget:CONNECT %s:80 = 400\n' \
		    "$host" "$host"
	done >> targets
	printf 'target:CONNECT %s = 400\n' a: :80 a:80/ / '*' >> targets
	rows < targets
}

test_bad_host() { # no Host, two of them, or what is no host
	each 'refused 400' 'GET http://%O/ HTTP/1.1\n\n' \
	    'GET http://%O/ HTTP/1.1\nHost: %O\nHost: %O\n\n' \
	    'CONNECT %O HTTP/1.1\n\n'
	get='GET http://a/ HTTP'
	rows <<END
request:once $get/1.1\nHost: a\nhost: evil\n\n | $get/1.0\nHost: a\nHost: evil\n\n | $get/1.1\nHost: a b\n\n | $get/1.1\nHost: a/b\n\n | $get/1.1\nHost: u@a\n\n = 400
END
}

test_unit_lines() { # a line in a head that is no field, or a wrong length, in requests and responses
	rows <<'END'
line X-A: b | X-A: \xff\tb | X-A:b = 200 passes
line Content-Length: 4, 4\nContent-Length: 4 | Transfer-Encoding: chunked = 200 passes
line Transfer-Encoding: , chunked | Transfer-Encoding: chunked, | Transfer-Encoding: ,\t,Chunked ,, = 200 passes
line Content-Length: +4 | Content-Length: -4 | Content-Length: 4 4 | Content-Length: 0x4 | Content-Length: 4.0 | Content-Length: | Content-Length: , | Content-Length: 4, | Content-Length: ,4 | Content-Length: 4,,4 | Content-Length: 4, 5 | Content-Length: 4;x | Content-Length: "4" | Content-Length: \xb2 = 400 refused
line Content-Length: 18446744073709551620 | Content-Length: 9223372036854775808 | Content-Length: 99999999999999999999999999999999999999 = 400 refused
line Content-Length: 4\nContent-Length: 5 | Content-Length: 4\nX-A: b\ncontent-length: 04 4 = 400 refused
line Content-Length: 4\nTransfer-Encoding: chunked\nContent-Length: 5 | Transfer-Encoding: chunked\nContent-Length: x = 400 refused
line Content-Length: 4\nTransfer-Encoding: chunked | Transfer-Encoding: chunked\nContent-Length: 4 | Transfer-Encoding: chunked\nContent-Length: 0 = 400 passes
line Transfer-Encoding: chunkedx | Transfer-Encoding: chunked, chunked | Transfer-Encoding: chunked\nTransfer-Encoding: chunked | Transfer-Encoding: chunked\nTransfer-Encoding: | Transfer-Encoding: \nTransfer-Encoding: chunked | Transfer-Encoding: chunked,,chunked | Transfer-Encoding: chunked, gzip | Transfer-Encoding: chunked;q=1 | Transfer-Encoding: \x0bchunked | Transfer-Encoding: chunked\0 = 400 refused
line Transfer-Encoding: xchunked | Transfer-Encoding: gzip, chunked | Transfer-Encoding: gzip | Transfer-Encoding: gzip, | Transfer-Encoding:  | Transfer-Encoding: , | Transfer-Encoding: "chunked" | Transfer-Encoding: identity, chunked | Transfer-Encoding: gzip\nTransfer-Encoding: chunked | Transfer-Encoding: chunk ed = 501 refused
line Transfer-Encoding: identity = 501 passes
line Transfer-Encoding : chunked | X-A : b | X-A\t: b | X-A = 400 passes
line Transfer-Encoding : gzip | Content-Length : x = 400 refused
line \sX-A: b | \tX-A: b | \sX-A | \s: b | X-A: b\n c | X-A: b\n\tc | X-A: b\n\tc: d | X-A: b\n c: d | X-A: b\l c = 400 refused
line : b | X-A\l: b | X A: b | X A : b | X-A: b\rX-C: d | X-A: b\r | X-A: \0 | X-\0: b | X-A\0 | \0 = 400 refused
line X-A: b\x01 | X-A: b\x0b | X-A: b\x0c | X-A: b\x7f | X-\x01: b | X-\xe4: b | X-\x80: b | X(A): b | X/A: b | X"A: b = 400 refused
line X-A: b\lX-C: d | = = 400 passes
END
}

test_bad_protocols() { # other protocols on the port are told what to speak
	for hello in \
	    '\x16\x03\x01\x00\x05\x01\x00\x00\x01\xfc' \
	    '\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\{300:\xaa}' \
	    '\x05\x01\x00' '\x05\x02\x00\x02' \
	    '\x04\x01\x00\x50\x7f\x00\x00\x01\0' \
	    'PRI * HTTP/2.0\n\nSM\n\n\0\0\0\x04\0\0\0\0\0'; do
		play "$hello" <<END
		client send $hello ; eof
		sees~  ^HTTP/1.1 400
		sees~  ^Connection: close
		sees~  ^400 Bad Request: .*([Pp]lain HTTP|HTTP/1.1|HTTP proxy)
		sees~  ^-- end (eof|reset)
		log#   1 .
		log    " 400 .* why="
END
	done
	play 'an empty line in two pieces, and no more' <<'END'
	client send \r ; stall 100 ; send \l ; stall 100 ; shut ; eof
	sees~  ^-- end (eof|reset)
	== nothing at all leaves no trace
	client shut ; eof
	sees   -- end eof
	log!   .
END
}

# ---- 8. Bodies and flows: where a message ends ------------------------------

# Chunks that must end the exchange without looking whole: miscut TEXT
miscut() {
	play "chunks $1" <<END
	reply  200 Transfer-Encoding: chunked | 4\ngood\n
	origin stall 100 ; send $1 ; eof
	ask    / = 200 cut | good
	sees!~ (evil|^0+$)
	gets~  ^-- end (eof|reset)
	log    "GET http://%O/ HTTP/1.1" 200 4 .* end=server why="broken chunks in the answer"
END
}

test_unit_bodies() { # bodies: every split, and each byte behind each beginning of a chunk line; they leave whole, however slowly
	unit chunks encoding <<'END'
body:5 hello = hello, whole and 0 more
body:5 hello more = hello, whole and 5 more
body:5 hell = hell, broken and 0 left
body:0 GET = , whole and 3 more
body:none GET = , whole and 3 more
body:close hello = hello, whole and 0 more
body:close = , whole and 0 more
body:chunked 0\n\n = , whole and 0 more
body:chunked 000\n\nGET = , whole and 3 more
body:chunked 5\nhello\n0\n\n | 0000000000000005\nhello\n0\n\n | 5;a=b;c="d;\\"e"\nhello\n0;x\n\n | 5 ; a\nhello\n0\n\n = hello, whole and 0 more
body:chunked 5\nhello\nA\n0123456789\n0\n\nX = hello0123456789, whole and 1 more
body:chunked 5\nhello\n0\nA: b\nC: d\n\nGET = hello, whole and 3 more
body:chunked 1\n\r\n1\n\l\n0\n\n = \n, whole and 0 more
body:cut | 5 = , broken and 0 left
body:cut 5\nhello | 5\nhello\n | 5\nhello\n0\n = hello, broken and 0 left
body:cut 5\nhello\n0\nA: b\n = hello, broken and 6 left
body:chunked 00000000000000005\nhello\n0\n\n | 8000000000000000\nhello | FFFFFFFFFFFFFFFF\nhello | 5\lhello\n0\n\n | 5\rhello\n0\n\n = , broken
body:chunked 5\nhelloX\l0\n\n | 5\nhelloX\n0\n\n | 5\nhello\r0\n\n | 5\nhello\l0\n\n = hello, broken
body:chunked 5 5\nhello\n0\n\n | -5\nhello\n0\n\n | \s5\nhello\n0\n\n | 0x5\nhello\n0\n\n | g\nhello\n0\n\n | \nhello\n0\n\n | ;a\nhello\n0\n\n = , broken
body:chunked 5;a\lb\nhello\n0\n\n | 5;a\x01\nhello\n0\n\n | 5;a="a\lb"\nhello\n0\n\n | 5;a=\0\nhello\n0\n\n | 10000000000000000\nhello | FFFFFFFFFFFFFFFFF\nhello | +5\nhello\n0\n\n = , broken
body:chunked 0\nA : b\n\n | 0\nA: b\l\n\n | 0\n A: b\n\n | 0\nA: b\lB: c\n\n | 0\nA: b\rc\n\n | 0\nA\0: b\n\n | 0\nA: b\n c\n\n | 0\rX = , broken
END
}

test_body_request() { # request bodies by length and chunked, with trailers; megabytes both ways, in other pieces than they came
	play 'by length' <<'END'
	origin head ; want 5 ; say 200 | ok
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 5\n\nhe
	client stall 50 ; send llo ; answer
	sees   ok
	gets   POST / HTTP/1.1
	gets   Content-Length: 5
	gets   hello
	log    "POST http://%O/ HTTP/1.1" 200 2 .* up=5 .* end=done
	== of no bytes
	reply  200 | ok
	ask    POST / Content-Length: 0 = 200 | ok
	gets   Content-Length: 0
	== chunked, with extensions and a trailer
	origin head ; until \n0\n ; until \n\n ; say 200 | ok
	client send POST http://%O/ HTTP/1.1\nHost: %O\nTransfer-Encoding: chunked\nTrailer: X-Sum\n\n
	client send 5;ext="a;b\\"c"\nhello\n
	client chop 1 1 0000A\n, everyone\n0\nX-Sum: 15\n\n ; answer
	sees   ok
	gets   POST / HTTP/1.1
	gets   Transfer-Encoding: chunked
	gets   X-Sum: 15
	gets!~ (^Content-Length|ext=)
	log    "POST http://%O/ HTTP/1.1" 200 2 .* up=15 .* end=done
	== coding name in another case
	origin head ; until \n0\n\n ; say 200 | ok
	ask    PUT / Transfer-Encoding: Chunked | 2\nhi\n0\n\n = 200 | ok
	gets~  ^Transfer-Encoding: [Cc]hunked$
	gets   hi
	== GET with a body
	origin head ; want 5 ; say 200 | ok ; loop
	ask    /1 | hello
	ask    /2 | again
	sees#  2 HTTP/1.1 200 OK
	gets#  1 ^helloGET|^hello$
	gets~  again$
	gets#  2 ^-- connection
	== 3 MB up by length, down chunked
	origin head ; skip 3000000 ; say 200 Transfer-Encoding: chunked
	origin send 2DC6C0\n ; fill 3000000 ; send \n0\n\n
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 3000000\n\n
	client fill 3000000 ; answer
	sees   HTTP/1.1 200 OK
	log    200 3000000 .* up=3000000 .* end=done
	== 3 MB up chunked, down by length to a 1.0 client
	origin head ; until \n0\n\n ; say 200 Content-Length: 3000000
	origin fill 3000000
	client send POST http://%O/ HTTP/1.1\nHost: %O\nTransfer-Encoding: chunked\nConnection: close\n\n
	client send 2DC6C0\n ; fill 3000000 ; send \n0\n\n ; until \n\n
	client skip 3000000 ; eof
	sees   HTTP/1.1 200 OK
	log    200 3000000 .* up=3000000 .* end=done
	== an answer that comes while the request goes: echo
	reply  200 Content-Length: 3000003
	origin swap 3000000 ; send end
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 3000000\n\n
	client until \n\n ; swap 3000000 ; until end
	sees   HTTP/1.1 200 OK
	log    200 3000003 .* up=3000000 .* end=done
END
}

test_body_late_reader() { # a client that begins to read late gets it all
	for size in 3000000 $room_max $((room_max - 1)) $((room_max * 2)) \
	    $((room_max - 10)) $((room_max * 3 + 7)); do
		play "$size bytes, chunked by us" <<END
		reply  200
		origin fill $size
		client send GET http://%O/ HTTP/1.1\nHost: %O\nConnection: close\n\n
		client stall 300 ; answer ; eof
		sees~  ^HTTP/1.1 200 OK
		sees   -- end eof
		log    200 $size .* end=done
END
		if [ "$size" -lt 3000000 ]; then
			tail -c 5 "c$plays" | od -c | grep '0 .*r .*n .*r .*n' \
			    > end || fail "no last chunk after $size bytes"
		fi
	done
}

test_body_expect() { # Expect: 100-continue (RFC 9110 section 10.1.1); a refusal that is complete ends the exchange, whatever was to be uploaded
	play 'continued' <<'END'
	origin head ; quiet 100 ; say 100 Continue ; want 5 ; say 200 | ok
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 5\nExpect: 100-continue\n\n
	client until HTTP/1.1 100 Continue\n ; until \n\n ; send hello ; answer
	sees   HTTP/1.1 100 Continue
	sees   HTTP/1.1 200 OK
	sees   ok
	gets   Expect: 100-continue
	gets   hello
	log    "POST http://%O/ HTTP/1.1" 200 2 .* up=5
	== refused: the body is never sent
	reply  417 No | no
	ask    POST / Content-Length: 5\nExpect: 100-continue = 417 No | no
	gets!  hello
	log    "POST http://%O/ HTTP/1.1" 417 2 .* up=0
	== a 1.0 client gets no 100
	reply  100 Continue
	origin want 5 ; say 200 | ok
	ask    1.0 POST / Expect: 100-continue | hello
	sees#  1 ^HTTP/
	sees   ok
	== the client waits for 100
	origin head ; say 417 No | no ; eof
	client send POST http://%O/ HTTP/1.1\nHost: %O\nExpect: 100-continue\nContent-Length: 3\n\n ; eof
	sees   HTTP/1.1 417 No
	sees   Connection: close
	sees   no
	sees   -- end eof
	== HTTP/1.0, in chunks
	origin head ; send HTTP/1.1 413 No\nTransfer-Encoding: chunked\n\n2\nno\n0\n\n ; eof
	client send POST http://%O/ HTTP/1.0\nContent-Length: 3\n\n ; eof
	sees   no
	sees   -- end eof
END
}

test_body_early_answer() { # an answer before the request body is finished
	play '413, the server closes' <<'END'
	origin head ; want 1000 ; say 413 Too much\nConnection: close | big
	origin close
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 50000000\n\n
	client stuff 50000000 ; answer
	sees   HTTP/1.1 413 Too much
	sees   big
	log    "POST http://%O/ HTTP/1.1" 413 3
	== 413, the server goes on reading
	reply  413 Too much | big
	origin skip 3000000
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 3000000\n\n
	client until big ; stuff 3000000
	sees   HTTP/1.1 413 Too much
	sees   big
	log    "POST http://%O/ HTTP/1.1" 413 3
	gets~  ^-- end
	== the whole answer first, and the server reads on
	reply  200 | ok
	origin skip 3000000 ; until THE END
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 3000007\n\n
	client until ok ; stall 200 ; stuff 3000000 ; send THE END ; eof
	sees   HTTP/1.1 200 OK
	gets~  THE END
	log    "POST http://%O/ HTTP/1.1" 200 2 .* up=3000007 .* end=done
	== 200, then the server closes, and the client stops half-way
	origin head ; say 200 | ok ; close
	client send POST http://%O/ HTTP/1.1\nHost: x\nContent-Length: 9\n\nhalf
	client answer ; eof
	sees   HTTP/1.1 200 OK
	log    "POST http://%O/ HTTP/1.1" 200 2 .* end=done
	== 413 from a server that does not read, then reset
	origin until \n\n ; stall 300 ; say 413 Too much | big ; stall 300
	origin reset
	client send POST http://%O/ HTTP/1.1\nHost: %O\nTransfer-Encoding: chunked\n\nFFFFFF\n
	client stuff 16777215 ; until big
	sees   HTTP/1.1 413 Too much
	sees~  big
	== no answer, reset in the body
	origin until \n\n ; stall 300 ; reset
	client send POST http://%O/ HTTP/1.1\nHost: %O\nTransfer-Encoding: chunked\n\nFFFFFF\n
	client stuff 16777215 ; answer
	sees~  ^HTTP/1.1 502
END
}

test_body_response() { # trailers pass; an answer cut short never looks whole
	play 'chunked with a trailer' <<'END'
	reply  200 Transfer-Encoding: chunked\nTrailer: X-Sum
	origin chop 1 1 3;a=b\none\n3\ntwo\n0\nX-Sum: 6\n\n
	reply  200 | ok
	ask    / TE: trailers\nConnection: TE
	ask    /2
	sees   Transfer-Encoding: chunked
	sees   0
	sees+  X-Sum: 6
	sees+  
	sees+  HTTP/1.1 200 OK
	sees   ok
	gets#  1 ^-- connection
	log    200 6 .* end=done
	== a trailer field that Connection names is for one hop
	origin head ; until \n0\n\n ; say 200 Connection: X-Sum\nTransfer-Encoding: chunked
	origin send 3\none\n0\nX-Sum: 6\n\n
	client send POST http://%O/ HTTP/1.1\nHost: %O\nConnection: keep-alive, X-Hop\n
	client send Transfer-Encoding: chunked\n\n1\na\n0\nX-Hop: 7\n\n ; answer
	sees   Transfer-Encoding: chunked
	sees!~ ^X-Sum
	gets!~ ^X-Hop
	log    200 3 .* end=done
	== by length
	reply  200 Content-Length: 10 | hello
	ask    /
	sees   Content-Length: 10
	sees   hello
	sees~  ^-- end (eof|reset) answer
	log    200 5 .* end=(server|reset) why="
	== chunked, between chunks
	reply  200 Transfer-Encoding: chunked | 5\nhello\n
	ask    / = 200 cut | hello
	sees!~ ^0+$
	log    200 5 .* end=(server|reset) why="
	== chunked, in a chunk
	reply  200 Transfer-Encoding: chunked | 50\nhello
	ask    /
	sees   Transfer-Encoding: chunked
	sees!~ ^0+$
	sees~  ^-- end (eof|reset) answer
	log    200 .* end=(server|reset) why="
	== chunked, before the end of the trailers
	reply  200 Transfer-Encoding: chunked | 5\nhello\n0\nX-T: 1\n
	ask    /
	sees   Transfer-Encoding: chunked
	sees~  ^-- end (eof|reset) answer
	log    200 5 .* end=(server|reset) why="
	== chunked, to a 1.0 client: only a reset tells
	reply  200 Transfer-Encoding: chunked | 5\nhello\n
	origin stall 200
	ask    1.0 / = 200 OK
	sees~  ^-- end reset
	log    200 5 .* end=(server|reset) why="
	== to the close, but reset
	origin head ; send HTTP/1.1 200 OK\n\nhello ; stall 200 ; reset
	client send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; eof
	sees   HTTP/1.1 200 OK
	sees!~ ^0+$
	sees~  ^-- end
	log    200 5 .* end=(server|reset) why="
	== to the close, but reset, to a 1.0 client
	origin head ; send HTTP/1.1 200 OK\n\nhello ; stall 200 ; reset
	ask    1.0 / = 200 OK
	sees~  ^-- end reset
	log    200 5 .* end=(server|reset) why="
END
}

test_body_client_leaves() { # a client that goes away
	play 'in its request body' <<'END'
	origin head ; eof
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 50\n\nhello
	client stall 100 ; close
	gets   Content-Length: 50
	gets   hello
	gets~  ^-- end (eof|reset)
	log    "POST http://%O/ HTTP/1.1" (499|400) [0-9]+ .* up=5 .* end=[a-z]+ why="
	== in its request body, when the answer has begun: the server learns it
	reply  200 Transfer-Encoding: chunked | 3\none\n
	origin until hello ; eof ; close
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 50\n\nhello
	client until one ; shut ; eof
	gets   hello
	gets+  -- end eof
	log    "POST http://%O/ HTTP/1.1" 200 3 .* up=5 .* end=client why="the request body was cut short"
	== nor does the server wait behind a bad chunk
	reply  200 Transfer-Encoding: chunked | 3\none\n
	origin until hello ; eof ; close
	client send POST http://%O/ HTTP/1.1\nHost: %O\nTransfer-Encoding: chunked\n\n5\nhello\n
	client until one ; send x ; shut ; eof
	gets~  ^-- end eof
	log    "POST http://%O/ HTTP/1.1" 200 3 .* end=client why="broken chunks in the request body"
	== before the answer, a bad chunk is named though the client has sent all
	origin head ; eof
	client send POST http://%O/ HTTP/1.1\nHost: %O\nTransfer-Encoding: chunked\n\n5\nhelloX ; shut ; eof
	sees   HTTP/1.1 400 Bad Request
	log    "POST http://%O/ HTTP/1.1" 400 .* end=done why="broken chunks in the request body"
	== before the answer
	origin head ; eof
	client send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; stall 100 ; reset
	gets   GET / HTTP/1.1
	gets~  ^-- end (eof|reset)
	log    "GET http://%O/ HTTP/1.1" 499 0 .* end=(client|reset)
	== in the answer
	reply  200 Content-Length: 50000000
	origin stuff 50000000
	client send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; until \n\n
	client want 50000 ; reset
	gets~  ^-- end
	log    "GET http://%O/ HTTP/1.1" 200 [1-9][0-9]* .* end=(client|reset)
	== half-closed after its request: still answered
	origin head ; stall 100 ; say 200 | ok
	client send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; shut ; eof
	sees   HTTP/1.1 200 OK
	sees   ok
	sees+  -- end eof
	log    "GET http://%O/ HTTP/1.1" 200 2 .* end=done
END
}

test_body_upload_left() { # an early answer or a reset ends an upload that is stuck half-way
	start_proxy
	says=$("$peer" slow) || fail "no origin"
	echo "${says#* }" >> .pids
	head="POST http://127.0.0.1:${says% *}/ HTTP/1.1\nHost: x"
	"$peer" upload 16 "$proxy" "$head\nTransfer-Encoding: chunked\n\n" 1000
	served
	stop_proxy
	counts 16 log '" \(413\|502\) [0-9]* .* end='
}

# Answers that end while the client's buffer is full to the brim: brim KIND.
# How much the kernel takes beside it is not known, so all $lengths are tried.
brim() {
	for k in $lengths; do
		printf 'head\nsend HTTP/1.1 200 OK\\n%s\\n\nstall 30\n' \
		    "$([ "$1" = eof ] || printf %s 'Transfer-Encoding: chunked\n')"
		i=0
		while [ $((i += 1)) -le "$k" ]; do
			[ "$1" = eof ] ||
				printf 'send %x\\n\nstall 10\n' "$room_max"
			printf 'send \\{%s:x}\nstall 10\n' "$room_max"
			[ "$1" = eof ] || [ $i = "$k" ] ||
				printf '%s\n' 'send \n'
		done
		case $1 in
		last) printf '%s\n' 'send \n0\n\n' ;;
		trailer) printf '%s\n' 'send \n0\nX-Sum: \{900:a}\n\n' ;;
		esac
		echo "touch $1.$k"
		echo ---
	done > "$1.script"
	origin "$1" < "$1.script"
	for k in $lengths; do
		client_bg "c$1$k" "$T/p.sock" <<'END'
send GET http://%O/ HTTP/1.1\nHost: %O\nTE: trailers\nConnection: TE\n\n
await read ; answer
END
	done
	for k in $lengths; do
		comes "$1.$k"
	done
}

# Each client must have got the whole of it.
brim_read() {
	for k in $lengths; do
		ends "c$1$k" '^open$'
		[ "$1" != trailer ] || grep -a '^X-Sum: aaa' "c$1$k" \
		    > /dev/null || fail "$1: client $k misses it"
	done
}

test_body_last_chunk() { # the end of an answer comes, however full the buffers are
	start_proxy -l "$T/p.sock"
	patience 90000
	first=$((90000 / buffer))
	lengths=$(awk -v k=$((first > 0 ? first : 1)) -v last=$((230000 / buffer + 2)) \
	    'BEGIN { for (; k <= last; k++) print k }')
	for kind in eof last trailer; do
		brim $kind
	done
	"$peer" sleep 100
	touch read
	for kind in eof last trailer; do
		brim_read $kind
	done
	served
}

test_body_trailer_size() { # trailers of any size arrive whole or end the connection
	for short in 0 $((fields_max / 3)) $((fields_max - 1)); do
		for left in 0 6 100 127 136 145 260 400 1000; do
			long=$((room_max - left - short * 5 - 8))
			cat <<END
	== $short fields and $left bytes left
	reply  200 Transfer-Encoding: chunked | 5\nhello\n
	origin stall 10 ; send 0\n
	origin stall 10
	origin send \{$short:a:b\n}X:\{$long:y}\n\n
	ask    / TE: trailers\nConnection: TE
	sees   hello
	sees~  ^-- end (open|eof answer|reset answer)
	log    " 200 5 .* end=
END
		done
	done > sizes
	play 'no trailer' <<END
	reply  200 Transfer-Encoding: chunked | 5\nhello\n0\n\n
	ask    / = 200 | hello
	$(cat sizes)
END
	# Who has all of it has it told, and where 1000 bytes are left it is whole.
	grep -v '/well ' log | sed 1d > lines
	n=1
	while read -r line; do
		n=$((n + 1))
		read -r end < "c$n.end"
		case $end:$((n % 9)):$line in
		open:*:*' end=done' | e*:[!1]:* | r*:[!1]:*) ;;
		*) fail "play $n: $end, $line" ;;
		esac
	done < lines
	[ "$n" = "$plays" ] || fail "$n lines for $plays plays"
}

# Chunks of a request that must be refused; the origin, if it was asked,
# never sees a whole body: miscut_request TEXT
miscut_request() {
	play "request chunks $1" <<END
	origin head ; until \n0\n\n ; say 200 | evil
	client send POST http://%O/ HTTP/1.1\nHost: %O\nTransfer-Encoding: chunked\n\n4\ngood\n
	client stall 50 ; send $1 ; eof
	sees~  ^HTTP/1.1 400
	sees~  ^-- end (eof|reset)
	sees#  1 ^HTTP/
	gets!~ ^(0+|.*evil.*)$
	gets!~ ^-- end open
	log    "POST http://%O/ HTTP/1.1" 400 .* why="
END
}

test_bad_chunks() { # chunk sizes, line ends, extensions and trailers
	for bad in '00000000000000004\nevil' '-4\nevil' '\nevil' '4\levil' \
	    "4;x=\\{70000:y}\\nevil"; do
		miscut_request "$bad\\n0\\n\\n"
	done
	miscut_request '4\ngoodevil\n0\n\n'
	miscut_request '4\ngood\levil\n0\n\n'
	play 'a byte for the LF of the last chunk hides no request' <<'END'
	origin head ; until good\n ; eof
	client send POST http://%O/ HTTP/1.1\nHost: %O\nTransfer-Encoding: chunked\n\n4\ngood\n0\rX\nGET http://%O/evil HTTP/1.1\nHost: %O\n\n
	client eof
	sees~  ^HTTP/1.1 400
	sees~  ^-- end (eof|reset)
	sees#  1 ^HTTP/
	gets!~ (evil|^0+$)
	gets!~ ^-- end open
	log#   1 .
	log    "POST http://%O/ HTTP/1.1" 400 .* why="
END
	for bad in 'X-A : b' '\{401:X-A: b\n}X-B: c' "X-A: \\{$((buffer * 2)):y}"; do
		miscut_request "0\\n$bad\\n\\n"
	done
}

test_bad_trailers() { # trailers cannot frame, route or authorize
	play 'request' <<'END'
	origin head ; until \n0\n ; until \n ; stall 50 ; say 200 | ok
	ask    POST / Transfer-Encoding: chunked | 4\ngood\n0\nContent-Length: 3\nHost: evil\nTransfer-Encoding: x\nProxy-Authorization: Basic x\nAuthorization: Basic x\nContent-Type: x\nMax-Forwards: 1\nConnection: x\nX-Sum: 4\n\n = (200|400)
	gets   good
	gets!~ ^(Authorization|Content-Type|Max-Forwards|Content-Length: 3|Host: evil|Transfer-Encoding: x|Proxy-Auth|Connection)
	== response
	reply  200 Transfer-Encoding: chunked | 4\ngood\n0\n
	origin send Content-Length: 3\nTransfer-Encoding: x\nConnection: close\nProxy-Authenticate: x\nSet-Cookie: x\nCache-Control: x\nContent-Type: x\n\n
	ask    /
	sees   good
	sees!~ ^(Set-Cookie|Cache-Control|Content-Type|Content-Length|Transfer-Encoding: x|Connection|Proxy-Auth)
	sees~  ^-- end
END
}

test_error_response_chunks() { # bad chunks in a response end it visibly
	each miscut '00000000000000004\nevil\n0\n\n' '-4\nevil\n0\n\n' \
	    '\nevil\n0\n\n' '4\levil\n0\n\n' '0\rX\n' \
	    "4;x=\\{70000:y}\\nevil\\n0\\n\\n"
	play 'no CR LF behind the data' <<'END'
	reply  200 Transfer-Encoding: chunked | 4\ngoodevil\n0\n\n
	origin eof
	ask    / = 200 cut
	sees!~ ^0+$
	log    "GET http://%O/ HTTP/1.1" (200|502) .* why="
END
	for bad in 'X-A : b' '\{401:X-A: b\n}X-B: c' "X-A: \\{$((buffer * 2)):y}"; do
		play "trailer $bad" <<END
		reply  200 Transfer-Encoding: chunked | 4\ngood\n0\n
		origin send $bad\n\n ; eof
		ask    / = 200 cut | good
		gets~  ^-- end (eof|reset)
		log    "GET http://%O/ HTTP/1.1" 200 4 .* why="broken chunks in the answer"
END
	done
	play 'much ado about nothing: framing is bounded' <<'END'
	reply  200 Transfer-Encoding: chunked
	origin send \{200000:1;xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\na\n}0\n\n
	origin eof
	ask    /
	sees~  ^-- end
	log    "GET http://%O/ HTTP/1.1" 200
END
}

# ---- 9. Matchers and lists of domains ---------------------------------------

# What rules are made of, and the ClientHello for the log.  Rows:
#
#   network NETWORK [> IN > OUT] = NETWORK yes no, or none
#   days DAYS = BITS or none
#   hours HOURS = FROM TO or none
#   span DAYS HOURS [> IN > OUT] = MINUTES yes no
#   numbers:MAX RANGE = FIRST LAST or none
#   amount NUMBER = SIZE MS               -1 is none
#   needle BYTES > TEXT = found or not    however the text is split
#   hello HEX = NAME or none              whole, cut, in records
tables_matchers() {
	cat <<'EOF_UNIT'

static bool
network_says(const struct network *n, struct text address)
{
	struct address a;

	(void)address_parse(address, 80, &a);
	a.scope = a.family == AF_INET6 ? 7 : 0;
	return network_has(n, &a);
}

static void
row_network(struct text in)
{
	struct address unix_socket = { .family = AF_UNIX };
	struct text s;
	struct network n;

	in = kept(in);
	s = part_next(&in);
	memset(&n, 0xee, sizeof(n));
	if (!network_parse(at_guard(0, s.at, s.len), &n)) {
		say_row(n.bits == 0xeeeeeeee ? "none" : "touched");
		return;
	}
	say_row("%s/%u %s", address_host(&n.address), n.bits,
	    network_says(&n, part_next(&in)) ? "yes" : "no");
	say_row(network_says(&n, in) ? " yes" : " no");
	if (network_has(&n, &unix_socket) || n.address.scope != 0)
		say_row(", has a UNIX socket, or a scope");
}

/* Each length: the last address in, and the first one out. */
static void
check_lengths(void)
{
	struct address a;
	struct network n;
	unsigned i, bit;
	char s[40];

	for (i = 0; i <= 128; i++) {
		(void)snprintf(s, sizeof(s), "5a5a::/%u", i);
		if (!network_parse(string_at_guard(s), &n))
			unit_fail("network", s, "", 0);
		(void)address_parse(text_of("5a5a::"), 0, &a);
		for (bit = 0; bit < 128; bit++) {
			a.octets[bit / 8] ^= (unsigned char)(0x80 >> bit % 8);
			if (network_has(&n, &a) != (bit >= i))
				unit_fail("network", s, "bit", bit);
			a.octets[bit / 8] ^= (unsigned char)(0x80 >> bit % 8);
		}
	}
}

static void
row_days(struct text in)
{
	unsigned days = 0xeeee;

	if (days_parse(in, &days))
		say_row("%02x", days);
	else
		say_row(days == 0xeeee ? "none" : "touched");
}

/* What is cut is none. */
static void
row_hours(struct text in)
{
	int from = -1, to = -1, from_cut, to_cut;
	size_t n;

	if (!hours_parse(in, &from, &to)) {
		say_row(from == -1 && to == -1 ? "none" : "touched");
		return;
	}
	say_row("%d %d", from, to);
	for (n = 0; n < in.len; n++)
		if (hours_parse(at_guard(1, in.at, n), &from_cut, &to_cut))
			say_row(", cut %d", (int)n);
}

/* Each minute of the week. */
static void
row_span(struct text in)
{
	char days[40], hours[40], print[40];
	struct text yes, no;
	struct span s;
	int n = 0, minute, is_in = 0, is_out = 0;

	in = kept(in);
	(void)sscanf(in.at, "%39s %39s", days, hours);
	(void)part_next(&in);
	yes = part_next(&in);
	no = in;
	if (!days_parse(string_at_guard(days), &s.days) ||
	    !hours_parse(string_at_guard(hours), &s.from, &s.to))
		say_row("no span, ");
	for (minute = 0; minute < 7 * 1440; minute++) {
		struct tm when = { .tm_wday = minute / 1440,
			.tm_hour = minute % 1440 / 60, .tm_min = minute % 60,
			.tm_sec = 59 };
		bool has = span_has(&s, &when);

		n += has;
		(void)snprintf(print, sizeof(print), "%.3s %02d:%02d",
		    &"SunMonTueWedThuFriSat"[when.tm_wday * 3], when.tm_hour,
		    when.tm_min);
		is_in += text_is(yes, print) && has;
		is_out += text_is(no, print) && !has;
	}
	say_row("%d %s %s", n, is_in ? "yes" : "no", is_out ? "no" : "yes");
}

static void
row_numbers(struct text in)
{
	struct numbers r = { 123, 45 };

	if (numbers_parse(in, units_plain, strtoull(more, NULL, 10), &r))
		say_row("%llu %llu", (unsigned long long)r.first,
		    (unsigned long long)r.last);
	else
		say_row(r.first == 123 && r.last == 45 ? "none" : "touched");
}

static void
row_amount(struct text in)
{
	uint64_t size = UINT64_MAX, ms = UINT64_MAX;

	if (size_parse(in, &size) != (size != UINT64_MAX) ||
	    amount_parse(in, units_time, DURATION_MAX_MS, &ms) !=
	    (ms != UINT64_MAX))
		say_row("touched ");
	say_row("%lld %lld", (long long)size, (long long)ms);
}

/* Where the first n bytes of s end with the needle for the first time. */
static size_t
needle_plain(struct text needle, const char *s, size_t n)
{
	size_t i;

	for (i = needle.len; i <= n; i++)
		if (memcmp(s + i - needle.len, needle.at, needle.len) == 0)
			return i;
	return SIZE_MAX;
}

/* One needle in one text: whole, in two and three pieces, byte by byte. */
static void
row_needle(struct text in)
{
	struct text needle;
	size_t a, b, want;
	unsigned char state;
	bool first, second, third;

	in = kept(in);
	needle = part_next(&in);
	want = needle_plain(needle, in.at, in.len);
	say_row(want <= in.len ? "found" : "not");
	for (a = 0; a <= in.len; a++)
		for (b = a; b <= in.len; b++) {
			state = 0;
			first = needle_scan(needle, &state,
			    at_guard(0, in.at, a));
			second = needle_scan(needle, &state,
			    at_guard(0, in.at + a, b - a));
			third = needle_scan(needle, &state,
			    at_guard(0, in.at + b, in.len - b));
			if (first != (want <= a) || second != (want <= b) ||
			    third != (want <= in.len) ||
			    third != (state == needle.len))
				say_row(", split %d %d", (int)a, (int)b);
		}
	state = 0;
	for (a = 0; a < in.len; a++)
		if (needle_scan(needle, &state, at_guard(0, in.at + a, 1)) !=
		    (want <= a + 1))
			say_row(", byte %d", (int)a);
}

/* Each needle of a and b of len bytes in each text of n bytes of them. */
static void
needle_all(size_t len, size_t n)
{
	unsigned i, k;
	size_t bit;

	for (i = 0; i < 1U << len; i++)
		for (k = 0; k < 1U << n; k++) {
			char needle[8] = "", s[12] = "";
			unsigned char state = 0;
			bool has;

			for (bit = 0; bit < len; bit++)
				needle[bit] = i >> bit & 1 ? 'a' : 'b';
			for (bit = 0; bit < n; bit++)
				s[bit] = k >> bit & 1 ? 'a' : 'b';
			has = needle_scan(text_of(needle), &state,
			    text_cut(s, n));
			if (has != (needle_plain(text_of(needle), s, n) !=
			    SIZE_MAX))
				unit_fail("needle", needle, s, has);
		}
}

static void
check_needles(void)
{
	static char s[1024];
	unsigned char state = 0;
	size_t i, len;

	for (len = 1; len <= 5; len++)
		needle_all(len, 10);
	/* The longest. */
	memset(s, 'a', sizeof(s));
	s[700] = 'b';
	for (i = 0; i < sizeof(s); i++)
		if (needle_scan(at_guard(0, s + 446, 255), &state,
			text_cut(s + i, 1)) != (i >= 700))
			unit_fail("needle", "255 bytes", "at", (long long)i);
}

/* The bytes that hex digits stand for; blanks are skipped. */
static size_t
hex_bytes(struct text hex, char *to)
{
	size_t n = 0;

	for (; hex.len > 0; hex = text_from(hex, 1))
		if (*hex.at != ' ') {
			to[n++] = (char)(hex_value(hex.at[0]) << 4 |
			    hex_value(hex.at[1]));
			hex = text_from(hex, 1);
		}
	return n;
}

/* Appends a record with the n bytes at s. */
static size_t
record_put(char *to, const char *s, size_t n)
{
	memcpy(to, "\x16\x03\x01", 3);
	to[3] = (char)(n >> 8);
	to[4] = (char)n;
	memcpy(to + 5, s, n);
	return n + 5;
}

/* The name in the hello in s; "" if there is none. */
static const char *
hello_text(const char *s, size_t n)
{
	static char flat[HELLO_MAX], name[HOST_MAX + 1];

	(void)text_copy(hello_name(at_guard(0, s, n), flat), name,
	    sizeof(name));
	return name;
}

/* The hello in s has this name; cut before, the same or none. */
static void
hello_try(const char *what, const char *s, size_t n, const char *want)
{
	const char *got = hello_text(s, n);
	size_t i;

	if (strcmp(got, want) != 0)
		unit_fail("hello", what, got, 0);
	for (i = 0; i < n; i++) {
		got = hello_text(s, i);
		if (got[0] != '\0' && strcmp(got, want) != 0)
			unit_fail("hello", what, got, (long long)i);
	}
}

/* A hello's body, whole, with more behind it, and in two records. */
static void
row_hello(struct text in)
{
	char message[516] = { 1, 0 }, s[1024], name[HOST_MAX + 1];
	size_t n = hex_bytes(in, message + 4), len;

	message[2] = (char)(n >> 8);
	message[3] = (char)n;
	len = record_put(s, message, n + 4);
	(void)strcpy(name, hello_text(s, len));
	say_row("%s", name[0] ? name : "none");
	hello_try("whole", s, len, name);
	memset(message + 4 + n, 0, 9);
	len = record_put(s, message, n + 13);
	memset(s + len, 0xff, 9);
	hello_try("more", s, len + 9, name);
	len = record_put(s, message, n / 2);
	len += record_put(s + len, message + n / 2, n - n / 2 + 4);
	if (n > 1)
		hello_try("two records", s, len, name);
}

/* Each byte changed to each other: whatever comes of it is a sane name. */
static void
hello_mutate(const char *whole, size_t n)
{
	const char *name;
	char s[1024];
	size_t i, k;
	int c;

	for (i = 0; i < n; i++)
		for (c = 0; c < 256; c++) {
			memcpy(s, whole, n);
			s[i] = (char)c;
			name = hello_text(s, n);
			for (k = 0; name[k] != '\0'; k++)
				if (!is_alnum(name[k]) && name[k] != '-' &&
				    name[k] != '.' && name[k] != '_')
					unit_fail("name", name, "", c);
		}
}

/* The message in two and three records, split at each byte. */
static void
hello_split(const char *message, size_t n, const char *want)
{
	char s[1024];
	size_t a, b, len;

	for (a = 1; a < n; a++) {
		len = record_put(s, message, a);
		len += record_put(s + len, message + a, n - a);
		hello_try("two records", s, len, want);
		for (b = a + 1; b < n; b++) {
			len = record_put(s, message, a);
			len += record_put(s + len, message + a, b - a);
			len += record_put(s + len, message + b, n - b);
			if (strcmp(hello_text(s, len), want) != 0)
				unit_fail("three records", want, "",
				    (long long)a);
		}
	}
}

/* What openssl s_client -servername Www.Example.ORG says first. */
static void
row_openssl(struct text in)
{
	static const char name[] = "Www.Example.ORG";
	char s[1024];
	size_t n = hex_bytes(in, s);

	say_row("%s", hello_text(s, n));
	hello_try("openssl", s, n, name);
	memset(s + n, 0x47, 20);
	hello_try("openssl and more", s, n + 20, name);
	hello_mutate(s, n);
	hello_split(s + 5, n - 5, name);
	hello_try("nothing", "", 0, "");
}

/* Hosts of all lengths: one that is too long is none. */
static void
check_hosts(void)
{
	char hex[64 * 2 + 64], s[1024];
	size_t len, start;

	for (len = 1; len < 300; len++) {
		unsigned n = (unsigned)len;

		(void)snprintf(hex, sizeof(hex), "160301%04x 01%06x 0303"
		    "00112233445566778899aabbccddeeff"
		    "00112233445566778899aabbccddeeff 00 0002 1301 01 00"
		    "%04x 0000 %04x %04x 00 %04x", n + 56, n + 52, n + 9,
		    n + 5, n + 3, n);
		start = hex_bytes(text_of(hex), s);
		memset(s + start, 'A', len);
		if (strlen(hello_text(s, start + len)) !=
		    (len <= HOST_MAX ? len : 0))
			unit_fail("host", "", "length", (long long)len);
	}
}
EOF_UNIT
}

# What becomes of files in the formats of lists.  Rows:
#
#   domains FILE [> COVERED [> OTHERS]] = READ USED SKIPPED
#                       counts of lines, names and skipped lines; names that
#                       are covered by the list, and names that are not; a
#                       first "-" is none
#   refused FILE = WORDS
#   hash TEXT = HEX
tables_lists() {
	cat <<'EOF_UNIT'

enum { MILLION = 1000000 };

/* Makes the file `list` of n bytes. */
static void
file_make(const char *bytes, size_t n)
{
	FILE *f = fopen("list", "w");

	if (f == NULL || fwrite(bytes, 1, n, f) != n || fclose(f) != 0)
		unit_fail("cannot write", "list", strerror(errno), 0);
}

/* Loads the file at path at once; false: why says why, nothing is left. */
static bool
list_load(struct list *list, const char *path, char *why, size_t size)
{
	int got;

	memset(list, 0, sizeof(*list));
	list->path = path;
	list->fd = -1;
	while ((got = list_step(list)) == 0)
		;
	list_end(list);
	(void)snprintf(why, size, "%s: %s", path, list_why);
	if (got == -1)
		list_free(list);
	return got == 1;
}

/* Loads bytes that are fine. */
static void
list_from(struct list *list, const char *bytes, size_t n)
{
	char why[200] = "";

	file_make(bytes, n);
	if (!list_load(list, "list", why, sizeof(why)))
		unit_fail("refused", bytes, why, (long long)n);
	if (list->used + 1 > list->size && list->used > 0)
		unit_fail("full", bytes, "", (long long)list->used);
	if (8 * list->size > 16 * list->names + 8)
		unit_fail("large", bytes, "", (long long)list->size);
}

/* The n bytes at s are covered: asked right before the end of memory. */
static bool
list_covers(const struct list *list, const char *s, size_t n)
{
	char *copy = malloc(n + 1);
	bool covered;

	if (copy == NULL)
		exit(77);
	memcpy(copy + 1, s, n);
	covered = list_has(list, text_cut(copy + 1, n));
	free(copy);
	return covered;
}

/* Each of the words is covered, or each is not. */
static void
list_ask(const struct list *list, struct text words, bool covered)
{
	while (words.len > 0 && !text_is(words, "-")) {
		size_t n = text_find(words, ' ');

		n = n < words.len ? n : words.len;
		if (list_covers(list, words.at, n) != covered)
			say_row(", %.*s is%s covered", (int)n, words.at,
			    covered ? " not" : "");
		words = text_from(words, n + (n < words.len));
	}
}

static void
row_domains(struct text in)
{
	struct list list;
	struct text file;

	in = kept(in);
	file = part_next(&in);
	list_from(&list, file.at, file.len);
	say_row("%d %d %d", (int)list.read, (int)list.used, (int)list.skipped);
	list_ask(&list, part_next(&in), true);
	list_ask(&list, in, false);
	list_free(&list);
}

/* The same lines wherever the borders of the reader's buffer lie. */
static void
check_borders(void)
{
	static const char lines[] = "0.0.0.0 a.com b.com\r\n||c.com^\n"
	    "nonsense,\n@@||d.c.com^\r\naddress=/e.com/\nf.com";
	static const size_t sizes[] = { 512, 1024, 4096, 8192, 65536 };
	static char file[66000];
	size_t i, back;

	said[0] = '\0';
	for (i = 0; i < COUNT(sizes); i++)
		for (back = 0; back <= sizeof(lines); back++) {
			size_t n = sizes[i] - back, k;
			struct list list;

			for (k = 0; k < n; k++)
				file[k] = k % 100 == 99 || k + 1 == n ? '\n' :
				    k % 100 == 0 ? '#' : ' ';
			memcpy(file + n, lines, sizeof(lines));
			list_from(&list, file, n + sizeof(lines) - 1);
			list_ask(&list, text_of("a.com b.com c.com e.com f.com"),
			    true);
			list_ask(&list, text_of("d.c.com com nonsense"), false);
			if (list.read != (n + 99) / 100 + 6 || list.used != 6 ||
			    list.skipped != 1 || said[0] != '\0')
				unit_fail("border", "counts", said,
				    (long long)n);
			list_free(&list);
		}
}

/* The hashes of FNV-1a's authors. */
static void
row_hash(struct text in)
{
	say_row("%llx", (unsigned long long)hash_text(14695981039346656037U, in));
}

/* Hosts far longer than a name can be: what is listed is still found. */
static void
cover_long(const struct list *list)
{
	char host[1200];
	size_t i, k;

	for (i = 1; i < 1100; i++) {
		for (k = 0; k < i; k++)
			host[k] = (k + i) % 40 == 39 ? '.' : 'h';
		memcpy(host + i, ".a.com", 6);
		if (!list_covers(list, host, i + 6) ||
		    list_covers(list, host, i + 5))
			unit_fail("long host", "", "", (long long)i);
		memset(host, 'x', i);
		memcpy(host + i, "a.com", 5);
		if (list_covers(list, host, i + 5))
			unit_fail("long label", "", "", (long long)i);
		memset(host, '.', i);
		if (!list_covers(list, host, i + 5))
			unit_fail("dots in front", "", "", (long long)i);
	}
}

static void
check_cover(void)
{
	struct list list;
	size_t i;

	list_from(&list, "a.com\n", 6);
	if (list_has(&list, text_of("")))
		unit_fail("covered", "nothing", "", 0);
	cover_long(&list);
	for (i = 0; i < 256; i++) {
		char host[] = "x.a.com";

		host[1] = (char)i;
		if (list_covers(&list, host, 7) != (i == '.') && i != ':')
			unit_fail("byte", host, "", (long long)i);
	}
	list_free(&list);
	list_free(&list);
	if (list.slots != NULL || list_has(&list, text_of("a.com")))
		unit_fail("freed", "", "", 0);
}

/* A file that is refused, and with which words; nothing is left. */
static void
say_refusal(const char *path)
{
	struct list list;
	char why[300] = "";

	if (list_load(&list, path, why, sizeof(why)))
		say_row("taken");
	else
		say_row("%s", why);
	if (list.slots != NULL || list.used != 0 ||
	    list_has(&list, text_of("a.com")))
		say_row(", something is left");
	list_free(&list);
}

static void
row_refused(struct text in)
{
	file_make(in.at, in.len);
	say_refusal("list");
}

/* The same with the system's words for an error. */
static void
refused_for(const char *path, int error)
{
	char words[300];

	said[0] = '\0';
	say_refusal(path);
	(void)snprintf(words, sizeof(words), "%s: %s", path, strerror(error));
	if (strcmp(said, words) != 0)
		unit_fail("words", said, words, 0);
}

static void
check_refused(void)
{
	struct list list;
	char why[20];

	refused_for("missing", ENOENT);
	refused_for("", ENOENT);
	refused_for(".", EISDIR);
	file_make("a.com\n", 6);
	refused_for("list/x", ENOTDIR);
	if (geteuid() != 0 && chmod("list", 0) == 0)
		refused_for("list", EACCES);
	(void)remove("list");
	/* Words that do not fit are cut. */
	file_make("a.com\n\0", 7);
	if (list_load(&list, "list", why, sizeof(why)) ||
	    strcmp(why, "list: line 2: a NUL") != 0)
		unit_fail("cut", why, "", 0);
	if (!list_load(&list, "/dev/null", why, sizeof(why)) || list.used != 0)
		unit_fail("/dev/null", why, "", 0);
	list_free(&list);
}

/* The second pass finds another file than the first: is it seen? */
static void
check_changes(void)
{
	static const char *const files[] = { "", "a.com\n", "a.com\nb.com\n",
		"a.com\nb.com\nc.com\n", "0.0.0.0 a b c d e f g h i j k l m n\n" };
	size_t i, k;
	int got;

	for (i = 0; i < COUNT(files); i++)
		for (k = 0; k < COUNT(files); k++) {
			struct list list = { .path = "list", .fd = -1 };

			file_make(files[i], strlen(files[i]));
			while (list.slots == NULL)
				if (list_step(&list) != 0)
					exit(77);
			file_make(files[k], strlen(files[k]));
			while ((got = list_step(&list)) == 0)
				;
			if ((got == 1) != (i == k) || list.used >= list.size ||
			    (got == -1 && strstr(list_why, "it changed") == NULL))
				unit_fail("changed", files[i], files[k],
				    (long long)list.used);
			list_free(&list);
		}
}

/* Writes lines of a name each over the file, without and with a # by turns. */
static void
file_change(char *lines, size_t n, pid_t parent)
{
	int fd = open("list", O_WRONLY);
	size_t i;

	for (;;) {
		for (i = 0; i < n; i += 8)
			lines[i] = lines[i] == '#' ? 'x' : '#';
		if (getppid() != parent ||
		    pwrite(fd, lines, n, 0) != (ssize_t)n)
			_exit(0);
	}
}

/* A file that is written while it is read: taken whole, or refused. */
static void
check_races(void)
{
	static char lines[64001];
	time_t until = time(NULL) + 30;
	size_t i, refused_n = 0;
	char why[200];
	pid_t child, parent = getpid();

	for (i = 0; i < sizeof(lines) - 1; i += 8)
		(void)snprintf(lines + i, 9, "x%06lu\n", (unsigned long)i);
	file_make(lines, sizeof(lines) - 1);
	(void)fflush(stdout);
	child = fork();
	if (child == -1)
		exit(77);
	if (child == 0)
		file_change(lines, sizeof(lines) - 1, parent);
	for (i = 0; i < 300 || (refused_n == 0 && time(NULL) < until); i++) {
		struct list list;

		if (list_load(&list, "list", why, sizeof(why))) {
			if (list.used >= list.size)
				unit_fail("race", "full", "", (long long)i);
		} else if (list.slots != NULL ||
		    strcmp(why, "list: it changed while it was read") != 0)
			unit_fail("race", why, "", (long long)i);
		else
			refused_n++;
		list_free(&list);
	}
	(void)kill(child, SIGKILL);
	(void)waitpid(child, NULL, 0);
	if (refused_n == 0)
		unit_fail("race", "never refused", "", (long long)i);
}

/* The n-th domain, of 20 bytes or so; its parent is in no list. */
static size_t
domain_make(char *to, size_t size, unsigned long n)
{
	static const char *const subs[] = { "", "", "www.", "ads.", "track.",
		"cdn-7.static." };
	static const char *const tops[] = { "com", "net", "de", "co.uk",
		"info", "xyz", "com.br" };
	unsigned long mixed = n * 2654435761UL & 0xffffffffUL;

	return (size_t)snprintf(to, size, "%s%cad%lu-%03lx.%s",
	    subs[mixed % COUNT(subs)], (char)('a' + mixed / 7 % 26), n,
	    mixed / 97 % 4096, tops[mixed / 1009 % COUNT(tops)]);
}

/* A list of n domains, each so many times, mixed from three formats, is
 * loaded: a quarter of them is asked for, and as many others. */
static double
million_load(struct list *list, unsigned long n, int times)
{
	static const char *const before[] = { "", "0.0.0.0 ", "||" };
	FILE *f = fopen("list", "w");
	char host[100], why[200] = "";
	unsigned long i;
	clock_t start;
	double took;

	if (f == NULL)
		exit(77);
	for (i = 0; i < n * (unsigned long)times; i++) {
		(void)domain_make(host, sizeof(host), i % n);
		(void)fprintf(f, "%s%s%s\n", before[i % 3], host,
		    i % 3 == 2 ? "^" : "");
	}
	if (fclose(f) != 0)
		exit(77);
	start = clock();
	if (!list_load(list, "list", why, sizeof(why)) || list->skipped != 0 ||
	    list->read != n * (unsigned long)times || list->used != n)
		unit_fail("loaded", why, "", (long long)list->used);
	took = (double)(clock() - start) / CLOCKS_PER_SEC;
	for (i = 0; i < 2 * n; i += 4) {
		size_t len = domain_make(host, sizeof(host), i);

		if (list_has(list, text_cut(host, len)) != (i < n))
			unit_fail("million", host, "", (long long)i);
	}
	return took;
}

/* Nanoseconds to ask for a host of four labels and more, half covered. */
static double
million_ask(const struct list *list)
{
	enum { HOSTS = 4096, ROUNDS = 100 };
	static char hosts[HOSTS][100];
	static size_t lens[HOSTS];
	unsigned long covered = 0;
	clock_t start;
	size_t i;

	for (i = 0; i < HOSTS; i++) {
		memcpy(hosts[i], "x.y.", 4);
		lens[i] = 4 + domain_make(hosts[i] + 4, sizeof(hosts[i]) - 4,
		    (unsigned long)(i * 12345 % MILLION + i % 2 * MILLION));
	}
	start = clock();
	for (i = 0; i < HOSTS * ROUNDS; i++)
		covered += list_has(list, text_cut(hosts[i % HOSTS],
		    lens[i % HOSTS]));
	if (covered != (unsigned long)HOSTS / 2 * ROUNDS)
		unit_fail("covered", "", "", (long long)covered);
	return (double)(clock() - start) / CLOCKS_PER_SEC / ROUNDS / HOSTS * 1e9;
}

/* A million domains: all there, in how much memory, how fast. */
static void
check_million(void)
{
	struct list list;
	double took = million_load(&list, MILLION, 1), ns = million_ask(&list);

	printf("%.2f s, %ld ms, %.1f bytes a domain, %.0f ns a host\n", took,
	    (long)list.ms, (double)(list.size * sizeof(*list.slots)) / MILLION,
	    ns);
	if (list.size * sizeof(*list.slots) > 16UL * MILLION ||
	    list.size * 3 < list.used * 4)
		unit_fail("size", "", "", (long long)list.size);
	/* A build that is slow by design says so. */
	if (getenv("UNTIMED") == NULL && (took > 4 || ns > 4000))
		unit_fail("slow", "ns a host", "", (long long)ns);
	if (list.ms < 0 || (list.ms == 0 && took > 0.1))
		unit_fail("ms", "", "", (long long)list.ms);
	list_free(&list);
	/* What comes thrice is one domain. */
	(void)million_load(&list, 10000, 3);
	list_free(&list);
	(void)remove("list");
}
EOF_UNIT
}

test_match_networks() { # networks: read, masked, what is in them
	unit lengths <<'END'
network 10.0.0.0/8 > 10.255.0.1 > 11.0.0.0 | 10.1.2.3/8 > 10.0.0.0 > 9.255.255.255 | 10.0.0.0/08 > 10.0.0.0 > 11.0.0.0 | ::ffff:10.0.0.0/104 > 10.9.9.9 > 11.0.0.0 = 10.0.0.0/8 yes no
network 10.1.2.3 > 10.1.2.3 > 10.1.2.2 | 10.1.2.3/32 > 10.1.2.3 > 11.1.2.3 | ::ffff:10.1.2.3 > 10.1.2.3 > 10.1.2.4 | ::ffff:a01:203/128 > ::ffff:10.1.2.3 > ::10.1.2.3 = 10.1.2.3/32 yes no
network 10.1.2.3/31 > 10.1.2.2 > 10.1.2.4 = 10.1.2.2/31 yes no
network 10.1.2.3/0 > 255.1.2.3 > :: | 0.0.0.0/0 > ::ffff:1.2.3.4 > ::1 | ::ffff:0:0/96 > 8.8.8.8 > :: = 0.0.0.0/0 yes no
network 172.31.9.9/12 > 172.16.0.0 > 172.32.0.0 | 172.16.0.0/12 > 172.31.255.255 > 172.15.255.255 = 172.16.0.0/12 yes no
network 100.64.0.0/10 > 100.127.1.1 > 100.128.0.0 = 100.64.0.0/10 yes no
network 255.255.255.255/1 > 128.0.0.0 > 127.255.255.255 = 128.0.0.0/1 yes no
network 1.2.3.4/9 > 1.127.0.0 > 1.128.0.0 = 1.0.0.0/9 yes no
network ::1 > ::1 > :: = ::1/128 yes no
network ::/0 > ff02::1 > 1.2.3.4 = ::/0 yes no
network ::1/127 > ::1 > ::2 = ::/127 yes no
network 2001:db8::/32 > 2001:DB8:ffff::1 > 2001:db9:: = 2001:db8::/32 yes no
network 2001:db8:ffff::9/33 > 2001:db8:8000::1 > 2001:db8:7fff:: = 2001:db8:8000::/33 yes no
network fe80::1/10 > febf:: > fec0:: = fe80::/10 yes no
network fc00::/7 > fdff::1 > fe00:: = fc00::/7 yes no
network ::ffff:0:0/95 | ::ffff:10.0.0.0/8 | ::ffff:10.0.0.0/129 | 10.0.0.0/33 | 10.0.0.0/128 | ::/129 | 10.0.0.0/ | 10.0.0.0/-1 | 10.0.0.0/ 8 | 10.0.0.0/8\s | 10.0.0.0 /8 | 10.0.0.0/8/8 = none
network 10.0.0.0/255.0.0.0 | 10.0.0.0/4294967304 | 10.0.0.0/18446744073709551624 | 10.0.0/8 | 10/8 | /8 | | / | a/8 | [::1] | [::1]/128 | ::1%lo | 256.0.0.0/8 = none
END
}

test_match_times() { # days and hours, over midnight, each minute of the week
	rows <<'END'
days Sun = 01
days Mon | Mon-Mon | Mon,Mon = 02
days Sat | sat | SAT | sAT = 40
days Mon-Fri | mon-FRI = 3e
days Fri-Mon = 63
days Sat-Sun = 41
days Sun-Sat | Mon-Sun | Tue-Mon = 7f
days Sun-Mon = 03
days Mon,Wed,Fri-Sun = 6b
days Tue-Wed,Thu = 1c
days Sat-Sun,Mon-Tue = 47
days | , | Mon, | ,Mon | Mon,,Tue | Mon, Tue | \sMon | Mon\s | Monday | Mo | M | Mon- | -Mon | - | Mon-Tue-Wed | Mon--Tue | MonTue | Xxx | Mon-Xxx | unM | 1-5 | Mon-Fri, | Mon-Friday = none
hours 08:00-17:30 = 480 1050
hours 22:00-06:00 = 1320 360
hours 00:00-24:00 = 0 1440
hours 00:00-00:01 = 0 1
hours 23:59-24:00 = 1439 1440
hours 23:59-00:00 = 1439 0
hours 00:01-00:00 = 1 0
hours 08:00-08:00 | 00:00-00:00 | 24:00-24:00 | 24:00-06:00 | 00:00-24:01 | 08:60-09:00 | 08:00-09:60 | 25:00-26:00 | 8:00-17:30 | 08:00-7:30 | 08:0-17:30 | 008:00-17:30 | 08:000-17:30 = none
hours 08:00-17:300 | 08:00-017:30 | 08:00 -17:30 | 08:00-17:30\s | \s08:00-17:30 | 08:00 | 08:00- | -08:00 | | - | 08-17 | 0800-1730 | 08.00-17.30 = none
hours +8:00-17:30 | 08:00-17:30:00 | 08:00:17:30 | 08:00-17:3x | 08:00-12:00-13:00 | 99:99-99:99 = none
span Mon-Fri 08:00-17:30 > Mon 08:00 > Mon 07:59 | Mon-Fri 08:00-17:30 > Fri 17:29 > Fri 17:30 | Mon-Fri 08:00-17:30 > Wed 12:00 > Sat 12:00 = 2850 yes no
span Sun-Sat 00:00-24:00 > Sat 23:59 > none = 10080 yes yes
span Sun 00:00-24:00 > Sun 23:59 > Mon 00:00 | Sun 00:00-24:00 > Sun 00:00 > Sat 23:59 = 1440 yes no
span Fri 22:00-06:00 > Fri 22:00 > Fri 21:59 | Fri 22:00-06:00 > Fri 23:59 > Fri 05:59 | Fri 22:00-06:00 > Sat 00:00 > Sat 06:00 | Fri 22:00-06:00 > Sat 05:59 > Sat 22:00 | Sat 22:00-06:00 > Sun 05:59 > Sat 05:59 = 480 yes no
span Sat-Sun 22:00-06:00 > Mon 05:59 > Sat 05:59 = 960 yes no
span Sat 22:00-00:00 > Sat 23:59 > Sun 00:00 | Sat 22:00-24:00 > Sat 23:59 > Sun 00:00 = 120 yes no
span Sun 00:00-00:01 > Sun 00:00 > Sun 00:01 = 1 yes no
span Sun 00:01-00:00 > Sun 00:01 > Sun 00:00 = 1439 yes no
span Sun-Sat 12:01-12:00 > Sun 12:01 > Sun 12:00 = 10073 yes no
END
}

test_match_numbers() { # ranges, sizes, durations: range-checked
	rows <<'END'
numbers:65535 80 = 80 80
numbers:65535 0 = 0 0
numbers:65535 1000-2000 = 1000 2000
numbers:7 7-7 = 7 7
numbers:65535 0-65535 = 0 65535
numbers:18446744073709551615 0-18446744073709551615 = 0 18446744073709551615
numbers:18446744073709551615 18446744073709551615 = 18446744073709551615 18446744073709551615
numbers:65535 2000-1000 | 65536 | 1-65536 = none
numbers:18446744073709551615 0-18446744073709551616 = none
numbers:999 | - | 1- | -1 | 1-2-3 | 1--2 | \s1 | 1 -2 | 1- 2 | 1,2 | 4xx | +1 | a | 0x1 = none
amount 0 = 0 0
amount 1 = 1 1000
amount 90 = 90 90000
amount 90s | 90S = -1 90000
amount 1h = -1 3600000
amount 7d = -1 604800000
amount 15m | 15M = 15728640 900000
amount 1k | 1K = 1024 -1
amount 500M = 524288000 30000000
amount 20g | 20G = 21474836480 -1
amount 0K = 0 -1
amount 007K = 7168 -1
amount 0d = -1 0
amount 9223372036854775807 = 9223372036854775807 -1
amount 9007199254740991K = 9223372036854774784 -1
amount 8796093022207M = 9223372036853727232 -1
amount 8589934591G = 9223372035781033984 -1
amount 9223372036854775808 | 9007199254740992K | 8796093022208M | 8589934592G | 17179869184G | 18446744073709551617 | 18446744073709551617K = -1 -1
amount 315360000 = 315360000 315360000000
amount 315360001 = 315360001 -1
amount 315360000s | 87600h | 3650d = -1 315360000000
amount 315360001s | 87601h | 3651d = -1 -1
amount 5256000m = 5511315456000 315360000000
amount 5256001m = 5511316504576 -1
amount | K | s | m | 1T | 1w | 1KB | 1KK | 1 K | 1K\s | \s1K | -1K | +1 | 1.5G | 1h30m | ms | 0x1 | 1\xcb | 1\0 = -1 -1
amount 1ms | 001MS = -1 1
amount 315360000000ms = -1 315360000000
amount 315360000001ms = -1 -1
END
}

test_match_needles() { # bytes in a stream: every split gives the same
	eicar='X5O!P%@AP[4\\PZX54(P^)7CC)7}$EICAR-STANDARD-ANTIVIRUS-TEST-FILE!$H+H'
	unit needles <<END
needle a > a | a > bbbab | aab > aaab | aab > aaaaaab | aab > abaabaa | aaab > aabaaaab | abab > aabab = found
needle ababac > abababac | abcabd > abcabcabd | aaaa > aaabaaaa | nano > nannano | abacabad > abacabacabad | aa > ababababaa = found
needle participate > in parparticipaparticipate | \x80 > \x7f\x80 | \xff\xfe > \xff\xff\xfe | $eicar* > $eicar* | $eicar* > X5O!P%@AP[4\\PZX5$eicar*! = found
needle a > | a > b | aab > aaaa | long > lon | ng > n | $eicar* > $eicar = not
# A NUL is a byte like any other.
needle \0\0b > a\0\0\0b = found
needle \0\0b > a\0\0\0 = not
END
}

test_match_hello() { # a ClientHello: cut, split, changed at every byte
	random='0303 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff'
	# Version, random; no session, one cipher suite, no compression.
	start="$random 00 0002 1301 01 00"
	unit hosts <<END
openssl 160301014b010001470303f26838e4018d23671ff8ef42c9e01e1202c7355e8bd2bbac747fff08da548e6420107a88f06a686bbf094182931db9b2625e4086f7a83143d363b34c5fbc592c98003e130213031301c02cc030009fcca9cca8ccaac02bc02f009ec024c028006bc023c0270067c00ac0140039c009c0130033009d009c003d003c0035002f00ff010000c000000014001200000f5777772e4578616d706c652e4f5247000b000403000102000a00160014001d0017001e0019001801000101010201030104002300000010000b000908687474702f312e310016000000170000000d002a002804030503060308070808 0809080a080b080408050806040105010601030303010302040205020602002b0009080304030303020301002d00020101003300260024001d0020e1d8eefbda7487f9877e319e6aaeb4e7c470385065db3cf1148f6cf656eef97d = Www.Example.ORG
hello $start 000c 0000 0008 0006 00 0003 612e62 | $start 0010 0017 0000 0000 0008 0006 00 0003 612e62 | $start 0010 0000 0008 0006 00 0003 612e62 0017 0000 = a.b
hello $random 20 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff 0002 1301 01 00 000c 0000 0008 0006 00 0003 612e62 = a.b
hello $start 000d 0000 0009 0007 00 0004 412e422e = A.B.
hello $start 000c 0000 0008 0006 00 0003 5f392d = _9-
hello $start | $start 0000 | $start 0006 0017 0002 abcd | $start 0004 0017 0000 = none
hello $start 000a 0000 0006 0004 01 0001 ff | $start 000a 0000 0006 0004 01 0002 ff = none
hello | 0303 | $random | $random 00 00 | $random 00 0002 1301 = none
hello $start 0004 0000 0000 | $start 0005 0000 0001 00 | $start 0006 0000 0002 0000 | $start 0007 0000 0003 0001 00 | $start 0008 0000 0004 0002 0000 = none
hello $start 000c 0000 0008 0006 00 0004 612e62 | $start 0010 0000 0008 0006 00 0007 612e62 0017 0000 | $start 0009 0000 0005 0003 00 0000 = none
hello $start 000c 0000 0008 0006 00 0003 610062 | $start 000c 0000 0008 0006 00 0003 612062 | $start 000c 0000 0008 0006 00 0003 613a62 | $start 000c 0000 0008 0006 00 0003 612562 | $start 000c 0000 0008 0006 00 0003 61e462 = none
END
}

test_bad_nominated() { # Connection names no more fields than a head may have
	many=$(awk 'BEGIN { while (n++ < 401) printf "a%d,", n }')
	refused 431 "GET http://%O/ HTTP/1.1\\nHost: %O\\nConnection: $many\\n\\n"
	play 'from a server' <<END
	reply  200 Connection: $many | no
	ask    / = 502
END
}

test_bad_tls_hello() { # a browser's TLS hello is known, line feeds in it or not
	random='\x0a\x5e\x0d\x0a\x20\x47\{26:\x99}'
	server='\0\0\0\x10\0\x0e\0\0\x0bexample.com'
	curves='\0\x0a\0\x08\0\x06\0\x1d\0\x17\0\x18'
	formats='\0\x0b\0\x02\x01\0'
	ciphers='\0\x06\xc0\x2f\xc0\x30\0\x0a\x01\0'
	play 'hello' <<END
	client send \x16\x03\x01\0\x5b\x01\0\0\x57\x03\x03$random\0$ciphers\0\x26$server$curves$formats
	client eof
	sees~  ^HTTP/1.1 400
	sees~  ^400 Bad Request: .*TLS
	sees~  ^-- end (eof|reset)
	log#   1 .
	log    " 400 .* why=".*TLS
	== SOCKS with ten methods
	client send \x05\x0a\0\x01\x02\x03\x04\x05\x06\x07\x08\x09
	client eof
	sees~  ^HTTP/1.1 400
	sees~  ^400 Bad Request: .*SOCKS
	log    " 400 .* why=".*SOCKS
END
}

test_list_formats() { # lines of every format, limits, borders of the reader's buffer
	awk 'BEGIN { for (i = 245; i < 260; i++) {
		name = ""
		for (n = 0; n < i; n++)
			name = name (n % 50 == 49 && n + 1 < i ? "." : "n")
		print "domains " name (i % 2 ? "." : "") " > " (i > 253 ? "- > " : "") \
		    name " " name ". = 1 " (i > 253 ? "0 1" : "1 0")
	} for (i = 60; i < 70; i++) {
		name = sprintf("\\{%d:l}.com", i)
		print "domains " name " > " (i > 63 ? "- > " : "") name " = 1 " \
		    (i > 63 ? "0 1" : "1 0")
	} }' > names
	bom='\xef\xbb\xbf'
	unit borders <<END
domains > - > a com = 0 0 0
domains \l > - > a = 1 0 0
domains \l\l > - > a = 2 0 0
domains \n \t \n > - > a = 2 0 0
domains a.com > a.com > b.com | a.com\l > a.com > b.com = 1 1 0
domains a.com\nb.com\n > a.com b.com > com | a.com\nb.com\r > a.com b.com > com = 2 2 0
domains a.com\rb.com\l > - > a.com b.com = 1 0 1
domains ${bom}a.com\lb.com\l > a.com b.com = 2 2 0
domains a.com\l${bom}b.com\l > a.com > b.com = 2 1 1
domains $bom > - > a | $bom# x\n > - > x = 1 0 0
domains \s\ta.com \t\l > a.com | A.Com.\l > a.com | zip\l > zip a.zip > zipp | _a-b.c_d\l > _a-b.c_d = 1 1 0
domains a.com..\l > - > a.com = 1 0 1
# hosts files
domains 0.0.0.0 a.com b.com\l > a.com b.com > 0.0.0.0 | 0.0.0.0  a.com\t\t b.com  # c.com\l > a.com b.com > c.com = 1 2 0
domains 127.0.0.1\ta.com\l::1 b.com\l:: c.com\l > a.com b.com c.com > 127.0.0.1 ::1 :: com = 3 3 0
domains 0:0:0:0:0:0:0:0 a.com\l > a.com | 0.0.0.0 printer\l > printer a.printer | 0.0.0.0 localhost a.com\l > a.com > localhost = 1 1 0
domains 0.0.0.0 0.0.0.0\l127.0.0.1 localhost\l127.0.0.1 localhost.localdomain\l127.0.0.1 LOCAL\l::1 ip6-localhost ip6-loopback\lfe80::1%lo0 localhost\l255.255.255.255 broadcasthost\lfe00::0 ip6-localnet\lff00::0 ip6-mcastprefix\lff02::1 ip6-allnodes\lff02::2 ip6-allrouters\lff02::3 ip6-allhosts\l > - > localhost local a.local localhost.localdomain = 12 0 0
domains 0.0.0.0 1.2.3.4\l > - > 1.2.3.4 | 10.0.0.1 a.com\l > - > a.com | 8.8.8.8 a.com localhost\l > - > a.com localhost | 0.0.0 a.com\l > - > a.com | a.com b.com\l > - > a.com b.com = 1 0 1
domains see localhost\l > - > see | 0.0.0.0 *.a.com\l > - > a.com | 0.0.0.0\l > - > 0.0.0.0 | 0.0.0.0 # a.com\l > - > a.com = 1 0 1
domains 0.0.0.0 a.com b/c d.com\l > a.com d.com > c = 1 2 1
# with what is below
domains *.a.com\l.b.com\l > a.com x.a.com b.com x.b.com > com xa.com = 2 2 0
domains *\l*.\l.\l..a.com\l*..a.com\l*a.com\la.*\la.*.com\l > - > a.com com a = 8 0 8
# dnsmasq
domains address=/a.com/\laddress=/b.com/0.0.0.0\laddress=/c.com/::\laddress=/d.com/#\laddress=/e.com/127.0.0.1\l > a.com b.com c.com d.com e.com x.a.com = 5 5 0
domains address=/a.com/b.com/0.0.0.0\laddress=/c.com/d.com/\l > a.com b.com c.com d.com > 0.0.0.0 = 2 4 0
domains server=/a.com/\llocal=/b.com/c.com/ # x\l > a.com b.com c.com = 2 3 0
domains Address=/.a.com/\llocal=/*.b.com/\l > a.com x.b.com = 2 2 0
domains address=/a.com/10.0.0.1\lserver=/b.com/8.8.8.8\lserver=/c.com/127.0.0.1\lserver=/d.com/#\lserver=8.8.8.8\llocal=/e.com/0.0.0.0\l > - > a.com b.com c.com d.com e.com 8.8.8.8 = 6 0 6
domains address=\laddress=/\laddress=//\laddress=/a.com\laddress=a.com\laddress=///\laddress=/#/\laddress=/a.com/b.com\l=/a.com/\l > - > a.com b.com = 9 0 9
domains address=/a.com//b.com/\l > a.com b.com = 1 2 1
# Adblock
domains [Adblock Plus 2.0]\l! Title: a.com\l||a.com^\l > a.com x.a.com > com xa.com = 3 1 0
domains ||a.com^\l@@||b.a.com^\l > a.com c.a.com > b.a.com x.b.a.com = 2 2 0
domains ||a.com^\$third-party\l||a.com^\$important\l||a.com^\$all\l||a.com\l||a.com/b\l||a.com/b^\l||a.com^*/b\l|a.com^\l||*.a.com^\l||a.*^\l||a.com^|\l|http://a.com^\l/a\\.com/\l@@a.com\l@@|a.com^\l@@||a.com\l@@||a.com^\$document\l@@\l||\l||^\l@@||^\l|\l^\l||1.2.3.4^\l-a.com-\l > -a.com- > a.com b.com 1.2.3.4 = 25 1 24
domains a.com##.ad\l##.ad\l###ad\la.com#@#.ad\l##.a.com # b\l##div[a] b\l > - > a.com ad = 6 0 6
# comments
domains #a.com\l# a.com\l!a.com\l;a.com\l ; a.com\l## a.com\l##\l####\l#######a.com\l### a.com ###\l[x]\l > - > a.com = 11 0 0
domains a.com # b.com\lc.com\t#d.com\le.com#f.com\l > a.com c.com > b.com d.com e.com f.com = 3 2 1
# what is none of it
domains http://a.com/\la.com/\la.com:80\la.com,b\la b c\l<html>\l{"a": 1}\l\xc3\xa4.com\la..com\l.com.\l[x\l > com a.com > a b = 11 1 10
domains 1.2.3.4\l::1\l1234\la.1\la.0x1F\l0x\l > - > 1.2.3.4 ::1 1234 a.1 1 = 6 0 6
domains 1.a\l1a\l0xg\l4.0x1.x\l > 1.a 1a 0xg 4.0x1.x > a = 4 4 0
# the same again
domains a.com\lA.COM\la.com.\l||a.com^\l0.0.0.0 a.com a.com\lx.a.com\l > a.com > com = 6 2 0
domains 0.0.0.0 a b c d a b\l > a b c d > e = 1 4 0
# lines as long as they may be, and longer by one
domains a.com # \{991:x}\l > a.com > b.com | a.com # \{992:x} > a.com > b.com | a.com # \{992:x}\l > a.com > b.com | a.com # \{991:x}\n > a.com > b.com = 1 1 0
domains a.com # \{993:x} > - > a.com b.com | a.com # \{993:x}\l > - > a.com b.com = 1 0 1
domains a.com # \{992:x}\lb.com\l > a.com b.com = 2 2 0
domains a.com # \{993:x}\lb.com > b.com > a.com | a.com # \{1994:x}\lb.com\l > b.com > a.com | a.com # \{299992:x}\lb.com\l > b.com > a.com = 2 1 1
domains a.com # \{2995:x}\l\lb.com\l > b.com > a.com = 3 1 1
# labels of 63 bytes and names of 253, and longer
$(cat names)
END
}

test_list_cover() { # labels, case, dots, exceptions, addresses; the hash
	unit cover <<'END'
hash = cbf29ce484222325
hash a = af63dc4c8601ec8c
hash foobar = 85944171f73967e8
domains a.com\lb.c.d.com\le\l@@||ok.a.com^\l||no.ok.a.com^\l@@||f.com^\lf.com\l||deep.f.com^\l4\lx4\l@@||b.com^\l > a.com A.COM a.com. a.com.. x.a.com X.y.Z.a.Com. .a.com ..a.com x..a.com b.c.d.com a.b.c.d.com e a.e e. x4 3.x4 > com m .com xa.com a.co a.comm a.com.x a.com.x. c.d.com d.com xb.c.d.com b-c.d.com ok.a.com x.ok.a.com OK.A.com. no.ok.a.com f.com x.f.com deep.f.com b.com ee e.f a..com . .. a.com/ a.com:80 [::1] ::1 ::ffff:1.2.3.4 1.2.3.4 4 3.4 4. fe80::1%a.com 0x4 a.com\tx a%2ecom = 11 9 1
END
}

test_list_bad() { # files that are refused, and one that changes meanwhile
	# A NUL in a line that is too long, wherever in it.
	awk 'BEGIN { for (i = 984; i < 4994; i += i < 1004 ? 1 : 997)
		printf "refused a.com\\l\\{%d:x}\\0\\{%d:x} = %s\n", i, 4993 - i,
		    "list: line 2: a NUL byte: this is no text" }' > long
	unit refused changes races <<END
refused \0 | \xff\xfea\0.\0 = list: line 1: a NUL byte: this is no text
refused a.com\l# x\lb.c\0om\lc.com\l = list: line 3: a NUL byte: this is no text
refused a.com\l\0 = list: line 2: a NUL byte: this is no text
$(cat long)
END
}

test_list_million() { # a million domains: soon loaded, 16 bytes each, 1 us a label
	if sanitized; then
		UNTIMED=1
		export UNTIMED
	fi
	unit million
}

# ---- 10. Rules: judging -----------------------------------------------------

# What rules make of a request.  A row `rule LINE' is one more rule, or after
# rows of other kinds the first of new ones.  The others are about
#
#   METHOD URL [client A] [user NAME] [time DAY,HH:MM] [address A] [FIELDS]
#       [> STATUS [FIELDS]]
#
# the last two being the server's; GET http://a/ may be left out before the >.
#
#   ask      allow, deny STATUS, login, drop, open; at RULE
#   route    via URL ..., direct; none, if no rule says, or open; at RULE
#   source   from ADDRESS ...
#   caches   cache SECONDS, nocache
#   sends    the head that goes to the server, but for its line and Host
#   gives    the response's fields for the client, but for Date
#
# `login USER:PASSWORD' is the user who logs in; login:field has all of the
# field's value.
#
# After `if CONDITION', rows `yes' and `no' have such things for which it holds
# or not, and the other way round with `not' before it; `never' has those for
# which neither holds.  After `given', with one such thing, they have conditions.
tables_rules() {
	cat <<'EOF_UNIT'

static struct exchange exchange;	/* what a row is about */
static struct response answer;		/* if it has one */
static struct rules *both[2];		/* of `if': without and with `not' */
static char given[ROW_MAX];	/* the exchange, if conditions vary */
static bool judged;			/* the next rule is the first */

/* The rules that options name; none, with a failure, if they are wrong. */
static struct rules *
rules_make(void)
{
	struct rules *old = rules_now, *rules;

	rules_now = NULL;
	if (!rules_read())
		unit_fail("wrong rules", options.sources[0].at, "", 0);
	rules = rules_now;
	rules_now = old;
	return rules;
}

static void
row_rule(struct text in)
{
	static char lines[SOURCES_MAX][RULE_LINE_MAX + 2];

	if (judged) {
		rules_give(&rules_now);
		options.sources_n = 0;
	}
	judged = false;
	(void)text_copy(in, lines[options.sources_n], sizeof(lines[0]));
	options.sources[options.sources_n].line = true;
	options.sources[options.sources_n].at = lines[options.sources_n];
	options.sources_n++;
}

/* Sunday of a week, or another day, at HH:MM by local time. */
static void
time_set(const char *day)
{
	static const char *const days = "SunMonTueWedThuFriSat";
	char name[4] = { day[0], day[1], day[2], '\0' };
	struct tm when = { .tm_year = 126, .tm_mon = 10, .tm_isdst = -1 };

	when.tm_mday = 22 + (int)(strstr(days, name) - days) / 3;
	when.tm_hour = (int)strtol(day + 4, NULL, 10);
	when.tm_min = (int)strtol(day + 7, NULL, 10);
	now.wall = mktime(&when);
}

/* What is known of the exchange besides its heads. */
static void
exchange_set(struct exchange *x, const char *word, const char *value)
{
	const struct account *a = x->rules->accounts;

	if (strcmp(word, "time") == 0)
		time_set(value);
	else if (strcmp(word, "address") == 0)
		(void)address_parse(text_of(value), 80, &x->record.server);
	else if (strcmp(word, "client") == 0) {
		(void)address_parse(text_of(value), 4242, &x->peer);
		if (*value == '/')
			x->peer.family = AF_UNIX;
		x->local = address_is_local(&x->peer);
	} else if (strcmp(word, "user") == 0) {
		while (a != NULL && !text_is(a->user, value))
			a = a->next;
		x->record.user = a;
	} else
		unit_fail("no such word", word, value, 0);
}

/* The exchange of a row by those rules; 200, or the status that refuses it. */
static int
exchange_make(struct text in, struct rules *rules)
{
	static char line[ROW_MAX], head[ROW_MAX];
	static struct request q;
	struct exchange *x = &exchange;
	char word[40], value[4096], *s = line, *r;
	int n = 0, verdict;

	(void)snprintf(line, sizeof(line), "%s%.*s",
	    text_starts(in, "> ") ? "GET http://a/ " : "", (int)in.len, in.at);
	memset(x, 0, sizeof(*x));
	memset(&q, 0, sizeof(q));
	x->request = &q;
	x->rules = rules;
	exchange_set(x, "client", "127.0.0.1");
	answer.status = 0;
	r = strstr(line, " > ");
	if (r != NULL)
		*r = '\0';
	if (sscanf(s, "%39s %4095s %n", word, value, &n) != 2)
		unit_fail("no request", line, "", n);
	n = n < (int)strlen(s) ? n : (int)strlen(s);
	(void)snprintf(head, sizeof(head), "%s %s HTTP/1.1\r\nHost: x\r\n",
	    word, value);
	for (s += n; sscanf(s, "%39s %4095s %n", word, value, &n) == 2 &&
	    word[strlen(word) - 1] != ':'; s += n)
		exchange_set(x, word, value);
	(void)strcat(strcat(strcat(head, s), *s ? "\r\n" : ""), "\r\n");
	verdict = request_parse(at_guard(0, head, strlen(head)), &q);
	x->up.to = q.framing;
	if (verdict == 1 && r != NULL) {
		(void)snprintf(head, sizeof(head),
		    "HTTP/1.1 %.3s X\r\n%s%s\r\n", r + 3,
		    r[6] ? r + 7 : "", r[6] ? "\r\n" : "");
		verdict = response_parse(at_guard(1, head, strlen(head)),
		    q.method, &answer);
		x->down.to = answer.framing;
	}
	return verdict == 1 ? 200 : refusals[-verdict].status;
}

/* What the rules know of it. */
static void
view_make(struct view *v)
{
	struct exchange *x = &exchange;
	struct verdict route;

	exchange_view(x, NULL, NULL, v);
	route = group_judge(x->rules, GROUP_ROUTE, v);
	if (route.rule != NULL)
		x->request->route.parent = route.rule->parents;
	exchange_view(x, answer.status != 0 ? &answer : NULL, NULL, v);
}

/* Says what a rule does, and which it is. */
static void
verdict_say(struct verdict verdict, const struct view *v)
{
	static const char *const words[] = { [ACTION_ALLOW] = "allow",
		[ACTION_DENY] = "deny", [ACTION_LOGIN] = "login",
		[ACTION_DROP] = "drop", [ACTION_VIA] = "via",
		[ACTION_DIRECT] = "direct", [ACTION_FROM] = "from",
		[ACTION_NOCACHE] = "nocache", [ACTION_CACHE] = "cache" };
	const struct rule *rule = verdict.rule;
	const struct parent *p;
	int i;

	if (rule == NULL) {
		say_row(verdict.undecided == NULL ? "none" : "open");
		return;
	}
	say_row(rule->action == ACTION_LOGIN && !rule_refuses(rule, v->x->record.user) ?
	    "allow" : words[rule->action]);
	if (rule->action == ACTION_DENY)
		say_row(" %d", rule->status);
	if (rule->action == ACTION_CACHE)
		say_row(" %lld", (long long)rule->amount.first / 1000);
	for (p = rule->parents; p != NULL; p = p->next)
		say_row(p->kind == PARENT_NONE ? " direct" : " %s%s:%u",
		    p->kind == PARENT_HTTP ? "http://" : "socks5://", p->host,
		    p->port);
	for (i = 0; i < 2; i++)
		if (rule->from[i].family != 0)
			say_row(" %s", address_host(&rule->from[i]));
	say_row(" at %s", rule->where);
}

/* The rules of the rows before are read; false if they are wrong. */
static bool
rules_ready(void)
{
	if (!judged && rules_now == NULL)
		rules_now = rules_make();
	judged = true;
	return rules_now != NULL;
}

/* Makes the exchange by these rules; false: said why not. */
static bool
case_make(struct text in)
{
	int status = rules_ready() ? exchange_make(in, rules_now) : 0;

	if (status != 200)
		say_row("%d", status);
	return status == 200;
}

/* What a group of the rules says. */
static void
group_say(struct text in, enum rule_group group)
{
	struct view v;

	if (!case_make(in))
		return;
	view_make(&v);
	verdict_say(group_judge(rules_now, group, &v), &v);
}

/* A kind of row that is one call. */
#define ROW(kind, call) \
	static void row_##kind(struct text in) { call; }

ROW(ask, group_say(in, GROUP_ACCESS))
ROW(route, group_say(in, GROUP_ROUTE))
ROW(source, group_say(in, GROUP_SOURCE))
ROW(caches, group_say(in, GROUP_CACHE))

/* Says the fields of a head but for one, and gives its buffer back. */
static void
head_say(struct buffer *b, const char *but)
{
	struct text t = buffer_text(b), line;

	for (t = text_from(t, text_find(t, '\n') + 1); t.len > 2;
	    t = text_from(t, line.len)) {
		line = text_cut(t.at, text_find(t, '\n') + 1);
		if (!text_starts(line, but))
			say_text(line);
	}
	said[strlen(said) - (said[0] ? 2 : 0)] = '\0';
	say_row(said[0] ? "" : "-");
	buffer_give(&b);
}

static void
row_sends(struct text in)
{
	struct buffer *b = buffer_take();

	(void)strcpy(pseudonym, "p");
	if (!case_make(in))
		return;
	rules_rewrite(&exchange, NULL, &exchange.request->rewrites);
	request_build(&exchange, b);
	head_say(b, "Host: ");
}

static void
row_gives(struct text in)
{
	struct buffer *b = buffer_take();

	(void)strcpy(pseudonym, "p");
	if (!case_make(in))
		return;
	answer_by(&exchange, ANSWER_SERVER);
	response_build(&exchange, &answer, b);
	head_say(b, "Date: ");
}

/* Reads `deny 450 CONDITION' and `deny 450 not CONDITION'. */
static void
both_read(struct text condition)
{
	char line[RULE_LINE_MAX + 2];
	int i;

	options.sources_n = 1;
	options.sources[0].line = true;
	options.sources[0].at = line;
	for (i = 0; i < 2; i++) {
		rules_give(&both[i]);
		(void)snprintf(line, sizeof(line), "deny 450 %s%.*s",
		    i ? "not " : "", (int)condition.len, condition.at);
		both[i] = rules_make();
	}
	judged = true;
}

static void
row_if(struct text in)
{
	both_read(in);
	given[0] = '\0';
}

static void
row_given(struct text in)
{
	(void)text_copy(in, given, sizeof(given));
}

/* Whether each of both denies, with 450. */
static void
both_ask(struct text in, bool first, bool second)
{
	static char copy[ROW_MAX];
	bool want[2] = { first, second };
	struct verdict verdict;
	struct view v;
	int i, status;

	(void)text_copy(in, copy, sizeof(copy));
	if (given[0] != '\0')
		both_read(text_of(copy));
	for (i = 0; i < 2; i++) {
		status = both[i] == NULL ? 0 :
		    exchange_make(text_of(given[0] ? given : copy), both[i]);
		if (status == 200) {
			view_make(&v);
			verdict = group_judge(both[i], GROUP_ACCESS, &v);
			if (verdict.rule != NULL)
				status = verdict.rule->status;
		}
		if ((status == 450) != want[i])
			say_row("%s%d ", i ? "with not: " : "", status);
	}
}

ROW(yes, both_ask(in, true, false))
ROW(no, both_ask(in, false, true))
ROW(never, both_ask(in, false, false))

/* Who logs in with USER:PASSWORD; login:field has all of the field. */
static void
row_login(struct text in)
{
	static char value[ROW_MAX] = "Basic ";
	const struct account *a;
	struct head *head;

	base64_encode(in.at, in.len, value + strlen("Basic "));
	head = field_at_guard("Proxy-Authorization",
	    more[0] ? in : text_of(value));
	a = rules_ready() ? account_login(rules_now, head) : NULL;
	if (a == NULL)
		say_row("-");
	else
		say_text(a->user);
}
EOF_UNIT
}

test_rules_verdicts() { # the first line that holds decides, in each group; what is not known yet is waited for
	rows <<'END'
rule allow host a.example url /allowed
rule deny 451 host a.example
rule allow host a.example
rule deny 410 url /gone
rule deny 411 url /gone
ask GET http://a.example/allowed/gone = allow at -e:1
ask GET http://a.example/gone = deny 451 at -e:2
ask GET http://b.example/gone = deny 410 at -e:4
ask GET http://b.example/ = allow at built-in:3
# A line of another group before or behind changes nothing.
rule via http://p:1 host p.example
rule direct host a.example
rule set request X-A b
rule deny 451 host a.example
rule from 127.0.0.1
rule from 127.0.0.2
rule via http://p:2 host a.example p.example
rule allow host a.example
ask GET http://a.example/ = deny 451 at -e:4
ask GET http://b.example/ = allow at built-in:3
route GET http://a.example/ = direct at -e:2
route GET http://b.example/ = none
route GET http://p.example/ = via http://p:1 at -e:1
source GET http://a.example/ | GET http://b.example/ = from 127.0.0.1 at -e:5
rule deny 450 host a.example b.example method POST PUT not url /x /y
ask POST http://a.example/ | PUT http://b.example/ | PUT http://a.example/z = deny 450
ask GET http://a.example/ | POST http://c.example/ | POST http://a.example/x = allow
ask PUT http://b.example/y = allow
rule allow address 127.0.0.0/8
rule deny
ask GET http://a.example/ | CONNECT a.example:443 = open
ask GET http://a.example/ address 127.0.0.1 | GET http://127.0.0.1/ = allow at -e:1
ask CONNECT a.example:443 address 127.0.0.1 = allow at -e:1
ask GET http://a.example/ address 10.0.0.1 = deny 403
# A line behind that is known waits for the open one before, unless both refuse.
rule deny 450 type text/html host a.example
rule deny 451 host a.example
ask GET http://a.example/ = deny 451
rule allow type text/html
rule deny 451
ask GET http://a.example/ = open
ask > 200 Content-Type: text/html = allow at -e:1
ask > 200 = deny 451
# Who is denied anyway causes no look-up.
rule deny host denied.example
rule deny address 10.0.0.0/8 host both.example
rule deny 451 host both.example
rule deny address 10.0.0.0/8
rule allow host good.example address 127.0.0.0/8
rule allow host any.example
rule deny method POST
ask GET http://denied.example/ | CONNECT denied.example:443 = deny 403
ask GET http://both.example/ = deny 451
ask GET http://good.example/ | GET http://any.example/ = open
ask GET http://good.example/ address 127.0.0.1 = allow at -e:5
rule allow client 192.0.2.1 address 127.0.0.0/8
rule deny
ask GET http://c.example/ = deny 403
END
}

test_rules_no_lookup() { # who is denied anyway causes no look-up
	plain_origin
	start_ruled -e 'deny address 10.0.0.0/8 host both.example' \
	    -e 'deny 451 host both.example' -e 'deny address 10.0.0.0/8'
	: > names
	want 451 GET http://both.example:%p/
	asks CONNECT both.example:%p
	want 200 GET http://good.example:%p/
	lacks names both
	has names good.example
}

test_rules_addresses() { # each address of a server is judged by itself
	need_second_loopback
	NAME_ADDRESSES='127.0.0.2 127.0.0.1'
	start_ruled -e 'deny address 127.0.0.2 host a.example' \
	    -e 'deny address 127.0.0.1 127.0.0.2 host b.example'
	for says in no yes; do
		printf '%s\n' head "send HTTP/1.1 200 OK\\nContent-Length: \
${#says}\\n\\n$says" loop > $says.script
	done
	origin no -a 127.0.0.2 < no.script
	origin yes -a 127.0.0.1 -p "$origin_port" < yes.script
	want 200 GET http://c.example:%p/
	has a no
	want 200 GET http://a.example:%p/
	has a yes
	asks CONNECT a.example:%p
	last_line '^.* "CONNECT a.example' " server=127.0.0.1:$origin_port "
	want 403 GET http://b.example:%p/ '' ' rule=-e:2( |$)'
	grep -i '^Proxy-Status: .*error=destination_ip_prohibited' a > /dev/null ||
		fail "both denied: $(grep -i '^Proxy-Status' a)"
	# The log names the rule that let in the address that answers.
	start_ruled -e 'allow address 127.0.0.2' -e 'allow address 127.0.0.1'
	plain_origin one
	want 200 GET http://e.example:%p/ '' ' rule=-e:2( |$)'
	asks CONNECT e.example:%p
	last_line '^.* "CONNECT e.example' ' rule=-e:2( |$)'
	# Connections to 0.0.0.0 and :: arrive at loopback.
	NAME_ADDRESSES='0.0.0.0 ::'
	start_ruled -e 'deny address 127.0.0.0/8 ::1'
	for host in d.example 0 '[::]' 0.0.0.0; do
		want 403 GET "http://$host:%p/"
	done
}

test_rules_conditions() { # method, host, port, url, status, type, time: what they match
	TZ=LOC-5:30
	export TZ
	# As it is sent.
	rows <<'END'
if method GET M-SEARCH
yes GET http://a/ | M-SEARCH http://a/
no POST http://a/ | get http://a/ | GETS http://a/ | CONNECT a:1
if method CONNECT
yes CONNECT a:1
no GET http://a/
# Itself, or all below it; case and a dot at the end do not count.
if host films.example OTHER.example
yes GET http://films.example/ | GET http://FILMS.Example:8080/ | GET http://films.example./
yes GET http://other.example/ | CONNECT films.example:443 | GET http://films.example..:1/
no GET http://www.films.example/ | GET http://xfilms.example/ | CONNECT www.films.example:443
no GET http://films.example.org/films.example
if host .films.example
yes GET http://www.films.example/ | GET http://a.b.FILMS.example.:1/ | CONNECT www.films.example:1
no GET http://films.example/ | GET http://xfilms.example/ | GET http://www.films.example.org/
no CONNECT films.example:443
if host *.films.example
yes GET http://www.films.example/ | GET http://a.b.FILMS.example.:1/ | CONNECT www.films.example:1
no GET http://films.example/ | GET http://xfilms.example/ | GET http://www.films.example.org/
no CONNECT films.example:443
if host 127.0.0.1
yes GET http://127.0.0.1:8080/ | GET http://127.0.0.1./
no GET http://films.example/
if host films.example.
yes GET http://films.example/
# Numbers and ranges, also the default ones.
if port 1 8080
yes GET http://a:8080/ | CONNECT a:8080
no GET http://a/
if port 1-8079 8081-65535
yes GET http://a:1/
no GET http://a:8080/
if port 8080-8080
yes GET http://a:8080/
if port 80
yes GET http://a/ | GET http://a:80/
no GET http://a:8080/ | CONNECT a:8
if port 443
yes CONNECT a:443
no GET http://a/
# The whole URL; host in small letters, without port 80.
if url ^http://films\.example:8080/a
yes GET http://films.example:8080/a | GET http://FILMS.Example:8080/abc?d
no GET http://films.example:8080/A | GET http://films.example:8080/b/a
no GET http://www.films.example:8080/a | CONNECT films.example:8080
if url ^http://films\.example/(a|b)+$
yes GET http://films.example/a | GET http://FILMS.example:80/abba
no GET http://films.example/abbc | GET http://films.example:8080/a
if url ^films\.example:443$ ^other\.example:
yes CONNECT films.example:443 | CONNECT FILMS.example:443 | CONNECT other.example:443
no GET http://films.example:443/
if url [?&]q=[0-9]{2}$
yes GET http://a/?q=12 | GET http://a/x?a&q=12
no GET http://a/?q=1 | GET http://a/?q=123
if url "a b" ^http://[^/]*/$
yes GET http://a/ | GET http://a
no GET http://a/x
# Numbers and ranges.
if status 404 500-599
yes > 404 | > 500 | > 599
no > 200 | > 403 | > 405 | > 499
if status 200-299
yes > 200 | > 299
no > 301 Location: /
# One, or all of a kind; parameters and case do not count.
if type text/html Video/*
yes > 200 Content-Type: text/html | > 200 Content-Type: TEXT/Html;charset=utf-8
yes > 404 Content-Type: text/html ; a="b" | > 200 Content-Type: video/mp4
no > 200 Content-Type: text/htm | > 200 Content-Type: text/html5
no > 200 Content-Type: text/plain; x=text/html | > 200 Content-Type: videos/mp4
no > 200 X-Type: text/html\nContent-Type: a/b | > 200
# Browsers take the last.
if type application/x-evil
yes > 200 Content-Type: text/plain\nContent-Type: application/x-evil; a=b
# What can't ever be known makes no line hold.
given CONNECT a.example:443 address 127.0.0.1
never type text/html | status 200 | field response X-A b | size >1G | size <1G | body x
rule via http://p:1
rule deny address 127.0.0.0/8
rule deny not address 127.0.0.0/8
ask GET http://far.example/ | CONNECT far.example:443 = allow at built-in:3
# Days, hours, both.
given GET http://a/ time Wed,12:00
yes time Wed | time Tue-Thu | time Wed-Tue | time Fri,Wed | time Fri Tue-Wed
no time Thu | time Thu-Tue | time Fri,Sun
yes time 11:00-13:00
no time 13:00-14:00 | time 10:00-11:00 | time 10:00-11:00 13:00-14:00
yes time 10:00-11:00 11:00-13:00 13:00-14:00 | time 14:00-13:00
yes time Wed 11:00-13:00 | time Wed 10:00-11:00 11:00-13:00
no time Thu 11:00-13:00 | time Wed 13:00-14:00
no time Wed 13:00-14:00 Thu 11:00-13:00 | time Thu 13:00-14:00 11:00-13:00
yes time Thu 13:00-14:00 Wed 11:00-13:00
# Hours behind midnight belong to the day before.
given GET http://a/ time Wed,02:00
yes time 22:00-06:00 | time Tue 22:00-06:00 | time Mon-Tue 22:00-06:00
no time 22:00-01:00 | time Wed 22:00-06:00 | time Thu 22:00-06:00 | time Tue
given GET http://a/ time Wed,23:00
yes time 22:00-06:00 | time Wed 22:00-06:00
no time Tue 22:00-06:00 | time Wed 22:00-22:30
END
}

test_rules_client() { # client: networks, local
	rows <<'END'
given GET http://a/ client 127.0.0.1
yes client local | client 127.0.0.1 | client 127.0.0.0/8 | client 0.0.0.0/0
yes client 10.0.0.0/8 127.0.0.1 | client ::1 127.0.0.0/31 | client 192.0.2.7 local
no client 10.0.0.0/8 | client 127.0.0.2 | client 127.0.0.2/31 | client ::1
no client 2001:db8::/32 | client 128.0.0.0/1
given CONNECT a:1 client 127.0.0.1
yes client local | client 127.0.0.1 | client 127.0.0.0/8 | client 0.0.0.0/0
given GET http://a/ client ::1
yes client local | client ::1
no client ::2/127 127.0.0.1
given GET http://a/ client /a/socket
yes client local
no client 127.0.0.0/8 ::1
if client 10.0.0.0/8 192.0.2.128/25 192.0.2.7 2001:db8::/33 2001:db9::7
yes GET http://a/ client 10.0.0.0 | GET http://a/ client 10.255.255.255
no GET http://a/ client 9.255.255.255 | GET http://a/ client 11.0.0.0
yes GET http://a/ client 192.0.2.128 | GET http://a/ client 192.0.2.7
no GET http://a/ client 192.0.2.127 | GET http://a/ client 192.0.2.8
yes GET http://a/ client 2001:db8:7fff:: | GET http://a/ client 2001:db9::7
no GET http://a/ client 2001:db8:8000:: | GET http://a/ client 2001:db9::8
if client 192.0.2.7/32 0.0.0.0/0 2001:db8::/32 2001:db8::7/127
yes GET http://a/ client 192.0.2.7 | GET http://a/ client 203.0.113.1
yes GET http://a/ client 2001:db8:ffff:ffff::1
no GET http://a/ client 2001:db9::
if client 0.0.0.0/0 2001:db8::7/127
no GET http://a/ client 2001:db8::8 | GET http://a/ client ::1
if client ::/0
yes GET http://a/ client 2001:db8::8
END
	start_ruled -l "$T/p.sock" -e 'deny 450 client local'
	want 450 GET http://a.test/
	have_ipv6 || return 0
	start_ruled -l '[::1]:0' -e 'deny 450 client ::1'
	want 450 GET http://a.test/
}

test_rules_client_here() { # local: every address of this machine
	need_me
	unset PEER_FROM
	plain_origin
	start_proxy -l "$me:0"
	play -n 'the address that the banner tells works from here' <<'END'
	reply  200 | ok\l
	ask    / = 200 | ok\l
	ask    CONNECT %O = 200
END
	for from in "$me" 127.0.0.1; do
		PEER_FROM=$from
		export PEER_FROM
		start_ruled -l :0 -e 'deny 450 client local'
		want 450 GET http://%O/
		start_ruled -l :0 -e 'deny 450 not client local'
		want 200 GET http://%O/
	done
	start_ruled -e 'deny client local'
	want 403 GET http://%O/
	PEER_FROM=$me
	want 403 GET http://%O/ '' ' rule=built-in:1( |$)'
}

test_rules_client_elsewhere() { # clients that are not local
	need_me
	plain_origin far -a "$me"
	start_ruled -e "deny 450 client local" -e "allow client $me/32"
	want 200 GET http://%O/ '' "^$me - - " ' rule=-e:2( |$)'
	start_ruled -e "deny 450 not client local" -e 'allow'
	want 450 GET http://%O/
	start_ruled -e "allow client 198.51.100.0/24"
	want 403 GET http://%O/
}

test_rules_field() { # field: of the request; with response, of that
	n=$((room_max - 300))
	rows <<END
if field request user-agent ^curl/
yes GET http://a/ User-Agent: curl/8 | GET http://a/ USER-AGENT:   curl/8 \\s
yes GET http://a/ User-Agent: x\\nuser-agent: curl/8 | CONNECT a:1 User-Agent: curl/8
no GET http://a/ User-Agent: x curl/8 | GET http://a/ User-Agent: Curl/8
no GET http://a/ X-User-Agent: curl/8 | GET http://a/
if field request X-A "^a b\$"
yes GET http://a/ X-A: a b
no GET http://a/ X-A: a b c
if field X-A b
yes GET http://a/ X-A: abc
no GET http://a/ X-A: a | GET http://a/ | > 200 X-A: b
if field response Server ^nginx
yes > 200 Server: nginx/1 | > 404 server:nginx | > 200 Server: x\\nServer: nginx
no > 200 Server: an nginx | > 200 X-Server: nginx | > 200
if field request Server .
no > 200 Server: nginx
if field request X-A evil
yes GET http://a/ X-A: \\{$n:y}evil
END
}

test_rules_address() { # address: of the server, by number and by name
	rows <<'END'
if address 127.0.0.0/8
yes GET http://127.0.0.1/ | GET http://films.example/ address 127.0.0.1
yes CONNECT 127.0.0.1:1 | CONNECT films.example:1 address 127.0.0.1
yes GET http://[::ffff:127.0.0.1]/
if address 10.0.0.0/8 ::1 127.0.0.2
no GET http://127.0.0.1/ | GET http://films.example/ address 127.0.0.1
no CONNECT films.example:1 address 127.0.0.1
END
	start_ruled -e 'deny address 127.0.0.1 host a.example' \
	    -e 'deny 451 "not there" address 127.0.0.1 host b.example' \
	    -e 'deny host c.example'
	play -n 'Proxy-Status' <<'END'
	ask    http://a.example:%p/ = 403 Forbidden error=destination_ip_prohibited
	ask    http://b.example:%p/ = 451 error=destination_ip_prohibited
	sees~  ^451 .*: not there
	ask    http://c.example:%p/ = 403 Forbidden error=http_request_denied
	log    a.example.* 403 .*rule=-e:1
	log    b.example.* 451 .*rule=-e:2
	log    c.example.* 403 .*rule=-e:3
END
}

test_rules_deny() { # deny: status, reason, Proxy-Status, log; GET, HEAD, POST, CONNECT
	start_ruled -e 'deny host plain.example' \
	    -e 'deny 451 "no films at work" host films.example' \
	    -e 'deny 410 host gone.example' \
	    -e 'deny 405 host once.example not url /answer' \
	    -e 'deny 401 url /401$' -e 'deny 407 url /407$' -e 'deny 426 url /426$' \
	    -e 'answer 405 "never" url /answer' \
	    -e 'answer 401 "x" url /a401' -e 'answer 407 "x" url /a407' \
	    -e 'answer 426 "x" url /a426' -e 'answer 401 "x" url /own' \
	    -e 'set response WWW-Authenticate "Digest realm=a" url /own' \
	    -e 'answer 205 "x" url /a205' -e 'answer 304 "x" url /a304' -e 'answer 206 "four" url /a206'
	play 'the page tells the reason and nothing else' <<'END'
	reply  200 | ok
	ask    http://plain.example:%p/ = 403 Forbidden error=http_request_denied
	sees~  ^403 Forbidden: a rule forbids this(.l)?$
	sees+  -- end open
	sees#  1 ^Content-Type: text/plain
	gets!~ .
	log    "GET http://plain.example:%p/ HTTP/1.1" 403 [0-9]+ .* end=
END
	has log ' rule=-e:1'
	has log ' why="'
	play 'with 405 comes Allow (RFC 9110 section 15.5.6)' <<'END'
	ask    http://once.example:1/ = 405
	sees   Allow: 
	ask    http://once.example:1/answer = 405
	sees   Allow: 
	== other statuses have what they must have, too (RFC 9110 section 15)
	ask    http://a.example:1/401 = 401 Unauthorized
	sees~  ^WWW-Authenticate: Basic realm=
	ask    http://a.example:1/407 = 407
	sees~  ^Proxy-Authenticate: Basic realm=
	ask    http://a.example:1/426 = 426 Upgrade Required
	sees   Upgrade: TLS/1.2, HTTP/1.1
	sees   Connection: upgrade
	ask    http://a.example:1/a401 = 401
	ask    http://a.example:1/a407 = 407
	ask    http://a.example:1/a426 = 426
	ask    http://a.example:1/own = 401
	sees   WWW-Authenticate: Digest realm=a
	ask    http://a.example:1/a205 = 205
	sees   Content-Length: 0
	ask    http://a.example:1/a206 = 206
	sees   Content-Range: bytes 0-3/4
	ask    http://a.example:1/a304 = 304
	sees+~ ^Date: .*
	sees+~ ^Content-Type: .*
	sees+  
	sees#  2 ^WWW-Authenticate: Basic
	sees#  2 ^Proxy-Authenticate: 
	sees#  2 ^Upgrade: 
	== status and reason; the connection goes on
	ask    http://films.example:1/ = 451
	sees~  ^451 [A-Z].*: no films at work(.l)?
	ask    HEAD http://gone.example:1/ = 410
	ask    POST http://gone.example:1/ | hello = 410
	sees~  ^410.*: a rule forbids this
	sees#  1 ^410.*: a rule forbids this
	log    "GET http://films.example:1/ HTTP/1.1" 451 .*rule=-e:2
	log    "HEAD http://gone.example:1/ HTTP/1.1" 410 0 .*rule=-e:3
	log    "POST http://gone.example:1/ HTTP/1.1" 410 .*rule=-e:3
	== the second of three in one write
	origin head ; stall 100 ; say 200 | one\l
	reply  200 | three\l
	client send GET http://%O/1 HTTP/1.1\nHost: x\n\nGET http://films.example:%p/2 HTTP/1.1\nHost: x\n\nGET http://%O/3 HTTP/1.1\nHost: x\n\n
	client until three
	sees   one\l
	sees~  ^HTTP/1.1 451 
	sees~  ^HTTP/1.1 200 
	sees   three\l
	gets   GET /1 HTTP/1.1
	gets   GET /3 HTTP/1.1
	gets!~ ^GET /2
	== a body that waits for 100
	client send POST http://films.example:1/ HTTP/1.1\nHost: x\nExpect: 100-continue\nContent-Length: 5\n\n
	client until films at work
	sees~  ^HTTP/1.1 451 
	sees#  1 HTTP/1.1 
	== a long request body
	client send POST http://films.example:1/ HTTP/1.1\nHost: x\nContent-Length: 50000000\n\n
	client stuff 50000000 ; eof
	sees~  ^HTTP/1.1 451 
	sees~  ^-- end
	log    "POST http://films.example:1/ HTTP/1.1" 451 
	== a 1.0 client
	ask    1.0 http://films.example:1/ = 451
	sees~  ^451 .*: no films at work
	sees   -- end eof
	== a tunnel
	origin eof
	client send CONNECT films.example:%p HTTP/1.1\nHost: x\n\nhello ; eof
	sees~  ^HTTP/1.1 451 
	sees~  ^451 [A-Z].*: no films at work(.l)?$
	sees!~ ^HTTP/1.1 200
	gets!~ .
	log    "CONNECT films.example:%p HTTP/1.1" 451 .*rule=-e:2
END
}

test_rules_deny_answer() { # what came back is refused before it has begun
	start_ruled -e 'deny 451 "no films" type video/*' \
	    -e 'deny status 500-599'
	play 'by its type, by its status' <<'END'
	reply  200 Content-Type: video/mp4\nX-Secret: 1 | secret
	origin next
	reply  500 Oops\nX-Secret: 1\nTransfer-Encoding: chunked | 6\nsecret\n0\n\n
	origin next
	reply  200 | ok
	ask    /1 = 451 error=http_request_denied
	sees~  ^451 .*: no films
	ask    /2 = 403 Forbidden
	sees~  ^403 Forbidden: a rule forbids this
	ask    /3 = 200 OK
	sees~  ok$
	sees!~ ([Ss]ecret|Oops)
	log    /1 HTTP/1.1" 451 .*rule=-e:1
	log    /2 HTTP/1.1" 403 .*rule=-e:2
	log    /3 HTTP/1.1" 200 2
	== behind interim answers
	reply  103 Early\nX-A: b
	origin stall 50 ; say 200 Content-Type: video/mp4 | secret
	ask    /1
	sees~  ^HTTP/1.1 103 
	sees~  ^HTTP/1.1 451 
	sees!~ secret
	log    /1 HTTP/1.1" 451 
	== to HEAD
	reply  200 Content-Type: video/mp4\nContent-Length: 6
	ask    HEAD /1 = 451
	client quiet 100
	sees!~ ^451
END
	# A long body that nobody wants does not hold up the next request.
	play 'a long body' <<'END'
	reply  200 Content-Type: video/mp4\nContent-Length: 50000000
	origin stuff 50000000
	origin next
	reply  200 | ok
	ask    /1 = 451
	ask    /2 = 200 OK
END
}

test_rules_deny_cached() { # what is stored is judged anew
	start_ruled -c "$T/cache"
	origin o \
	    'reply 200 Content-Type: text/html\nCache-Control: max-age=999\nX-A: b | not clean'
	want 200 GET http://o.example:%p/
	want 200 GET http://o.example:%p/
	logged <<'END'
~ hit=fresh
END
	n=0
	each_line <<'END' | while read -r condition; do
type text/html | status 200 | field response X-A b | size <100 | host o.example
address 127.0.0.0/8 | not address 10.0.0.0/8
type text/plain | not status 200 | field response X-A c | size >100 | address 10.0.0.0/8
END
		echo "deny field request X-N ^$((n += 1))\$ $condition"
	done > anew
	start_rules -c "$T/cache" < anew
	for n in 1 2 3 4 5 6 7 8 9 10 11 12; do
		case $n in
		[1-7])
			want 403 GET http://o.example:%p/ "X-N: $n\n" ' 403 ' " rule=rules:$n( |$)"
			lacks a 'not clean'
			;;
		*) want 200 GET http://o.example:%p/ "X-N: $n\n" ' hit=fresh ' ;;
		esac
	done
	start_ruled -c "$T/cache" -e 'deny body "t cle"'
	asks GET http://o.example:%p/
	lacks a 'not clean'
	last_line ' rule=-e:1( |$)'
	[ ! -f o.2 ] || fail "the origin was asked again"
}

test_rules_drop() { # drop: closed without a word
	start_ruled -e 'drop host drop.example' -e 'drop type text/html' \
	    -e 'drop size >1000 host big.example'
	play 'a request, a tunnel, an answer' <<'END'
	reply  200 | ok
	client send GET http://drop.example:%p/ HTTP/1.1\nHost: x\n\n ; eof
	sees~  ^-- end (eof|reset)$
	sees!~ ^[^-]
	gets!~ .
	log    "GET http://drop.example:%p/ HTTP/1.1" 444 0 .*rule=-e:1
	== a tunnel
	origin eof
	client send CONNECT drop.example:%p HTTP/1.1\nHost: x\n\n ; eof
	sees!~ ^[^-]
	gets!~ .
	log    "CONNECT drop.example:%p HTTP/1.1" 444 0 .*rule=-e:1
	== an answer
	reply  200 Content-Type: text/html | ok
	client send GET http://%O/ HTTP/1.1\nHost: x\n\n ; eof
	sees!~ ^[^-]
	log    "GET http://%O/ HTTP/1.1" 444 0 .*rule=-e:2
	== in the middle of an answer
	reply  200 Transfer-Encoding: chunked | 1f4\n\{500:x}\n
	origin stall 200 ; send 1f5\n\{501:y}\n0\n\n
	ask    http://big.example:%p/ = 200 cut
	sees!~ ^0+$
	log    "GET http://big.example:%p/ HTTP/1.1" .* end=rule.*rule=-e:3
	== the second of two at once
	origin head ; stall 100 ; say 200 | ok
	client send GET http://%O/ HTTP/1.1\nHost: x\n\nGET http://drop.example:%p/ HTTP/1.1\nHost: x\n\n
	client eof
	sees#  1 HTTP/1.1 
	sees   ok
	sees~  ^-- end (eof|reset)$
	log    "GET http://%O/ HTTP/1.1" 200 2
	log    "GET http://drop.example:%p/ HTTP/1.1" 444 0
END
}

test_rules_login() { # login: 407, then whoever is known
	people
	start_rules <<'END'
users people
deny user carol host closed.example
allow host free.example
login
END
	plain_origin
	alice=$(basic alice:wonder)
	play -n 'asked, then let in, all on one connection' <<END
	replies 200 | ok
	ask    /1 = 407 Proxy Authentication Required
	sees   Proxy-Authenticate: Basic realm="proxy", charset="UTF-8"
	sees~  ^407 Proxy Authentication Required
	ask    /2 Proxy-Authorization: $alice = 200 OK
	ask    /3 = 407
	ask    http://free.example:%p/4 = 200 OK
	sees#  2 ^Proxy-Authenticate: 
	gets#  2 ^GET 
	gets   GET /2 HTTP/1.1
	gets   GET /4 HTTP/1.1
	gets!~ ^Proxy-Auth
	log    ^127.0.0.1 - - \[DATE\] "GET http://%O/1 HTTP/1.1" 407 .*rule=rules:4
	log    ^127.0.0.1 - alice \[DATE\] "GET http://%O/2 HTTP/1.1" 200 2 .*rule=rules:4
	log    ^127.0.0.1 - - \[DATE\] "GET http://%O/3 HTTP/1.1" 407 .*why="a user and password are needed"
	log    ^127.0.0.1 - - \[DATE\] "GET http://free.example:%p/4 HTTP/1.1" 200 2 .*rule=rules:3
END
	want 407 GET http://%O/ "$(login alice:wonde)"
	last_line ' 407 .* why="wrong user or password"' '^127.0.0.1 - - '
	want 407 GET http://%O/ "Authorization: $alice\n"
	want 200 GET http://%O/ "$(login "$(printf 'j\303\274rgen:gr\303\274n')")"
	last_line '^127.0.0.1 - j%[Cc]3%[Bb][Cc]rgen \['
	want 403 GET http://closed.example:%p/ "$(login carol:x)"
	last_line '^127.0.0.1 - carol \[' ' rule=rules:2( |$)'
	cat log err > said
	lacks said wonder
	lacks said "${alice#Basic }"
	rows <<END
rule users people
login alice:wonder = alice
login bob:a:b%41 = bob
login eve: pass word #1 = eve
login alice:wonde | alice:wonder2 | alice:Wonder | alice: | :wonder | alice = -
login Alice:wonder | dave:wonder | bob:a | bob:a:bA | # user:password | : = -
login alice:wonder: = -
login:field basic   ${alice#Basic } = alice
login:field Basic | Basic !!! | Bearer abc | x$alice | Basic = | ${alice}x = -
login:field $alice, $alice | Digest username="alice" = -
END
}

test_rules_login_connect() { # login: a tunnel; credentials are neither traced nor logged
	people
	start_ruled -vv -e 'users people' -e 'login'
	play -n 'asked' <<END
	origin eof
	client send CONNECT %O HTTP/1.1\nHost: %O\n\nping ; eof
	sees   HTTP/1.1 407 Proxy Authentication Required
	sees   Proxy-Authenticate: Basic realm="proxy", charset="UTF-8"
	gets!~ .
	log    - - \[DATE\] "CONNECT %O HTTP/1.1" 407 .*rule=-e:2
	== let in
	origin want 4 ; send pong
	client send CONNECT %O HTTP/1.1\nHost: %O\nProxy-Authorization: $(basic alice:wonder)\n\nping
	client answer head ; until pong
	sees~  ^HTTP/1.1 200
	sees   pong
	gets   -- connection 1
	gets+  ping
	log    - alice \[DATE\] "CONNECT %O HTTP/1.1" 200 .*rule=-e:2
END
	plain_origin
	for user in alice:wonder alice:wonderful; do
		asks GET http://%O/ "$(login $user)"
	done
	cat err log > said
	lacks said wonder
	alice=$(basic alice:wonder)
	lacks said "${alice#Basic }"
}

test_rules_user() { # user: some, any, none
	people
	rows <<END
rule users people
rule allow user alice bob host some.example
rule deny user * host guests.example
rule deny 451 not user * host members.example
rule deny 450 not user alice host private.example
rule deny 452 host some.example
rule allow
ask GET http://some.example/ user alice = allow at -e:2
ask GET http://some.example/ user carol | GET http://some.example/ = deny 452
ask GET http://guests.example/ user alice = deny 403
ask GET http://members.example/ = deny 451
ask GET http://guests.example/ | GET http://members.example/ user carol = allow
ask GET http://private.example/ user alice = allow
ask GET http://private.example/ user carol | GET http://private.example/ = deny 450
rule users people
rule allow user $(printf 'j\303\274rgen')
rule deny
ask GET http://a/ user $(printf 'j\303\274rgen') = allow at -e:2
ask GET http://a/ user alice | GET http://a/ = deny 403 at -e:3
END
}

test_rules_login_parent() { # our clients' credentials reach no parent
	people
	plain_origin p
	start_rules <<END
users people
login
via http://$origin host .plain.example
via http://me:pw@$origin
END
	alice="$(login alice:wonder)"
	want 200 GET http://a.plain.example/ "$alice"
	want 200 GET http://b.example/ "$alice"
	asks CONNECT a.plain.example:443 "$alice"
	cat p.[0-9] > all
	lacks all "$(basic alice:wonder)"
	counts 1 all '^Proxy-Authorization'
	has all "$(basic me:pw)"
	[ "$(grep -c -e '^GET' -e '^CONNECT' all)" = 3 ] || fail "requests are lost"
}

test_rules_login_elsewhere() { # who is not local may log in
	need_me
	people
	plain_origin o -a "$me"
	start_ruled -e 'users people' -e 'login not client 198.51.100.0/24'
	want 407 GET http://%O/
	want 200 GET http://%O/ "$(login alice:wonder)"
	last_line "^$me - alice " ' rule=-e:2( |$)'
	gives 407 http://127.0.0.1:%p/ || gives 403 http://127.0.0.1:%p/ ||
		fail "the guards are passed: $(head -n 1 a)"
	want 403 GET http://127.0.0.1:%p/ \
	    "$(login alice:wonder)"
}

test_rules_size() { # size: told beforehand, or counted
	start_ruled -c "$T/cache" -e 'deny size >1000 host big.example' \
	    -e 'deny size <10 host small.example'
	play -n 'chunked, enough' <<'END'
	reply  200 Transfer-Encoding: chunked | 1f4\n\{500:x}\n1f4\n\{500:y}\n
	origin stall 100 ; send 0\n\n
	ask    http://big.example:%p/
	log    200 1000 .* end=done
	== chunked, too much
	reply  200 Cache-Control: max-age=99\nTransfer-Encoding: chunked | 1f4\n\{500:Q}\n
	origin stall 200 ; send 1f5\n\{501:Z}\n0\n\n
	ask    http://big.example:%p/x = 200 cut
	sees!~ ^0+$
	log    /x HTTP/1.1" 200 [0-9]+ .* end=rule
END
	last_line ' rule=-e:1( |$)' ' why="'
	[ "$(tr -cd QZ < "c$plays" | wc -c)" -le 1000 ] ||
		fail "more than 1000 bytes have passed"
	play -n 'to the close' <<'END'
	origin head
	origin send HTTP/1.1 200 OK\nCache-Control: max-age=99\n\n\{900:x}
	origin stall 200 ; send \{900:x}
	ask    http://big.example:%p/y = 200 cut
	sees!~ ^0+$
	log    /y HTTP/1.1" 200 [0-9]+ .* end=rule
	== to the close, to a 1.0 client: only a reset tells
	origin head
	origin send HTTP/1.1 200 OK\nCache-Control: max-age=99\n\n\{900:x}
	origin stall 200 ; send \{900:x}
	ask    1.0 http://big.example:%p/z = 200
	sees~  ^-- end reset
	log    /z HTTP/1.0" 200 [0-9]+ .* end=rule
	== chunked, too little
	reply  200 Transfer-Encoding: chunked
	origin stall 100 ; send 9\nxxxxxxxxx\n0\n\n
	client send GET http://small.example:%p/ HTTP/1.1\nHost: x\n\n ; eof
	sees!~ ^0+$
	sees~  ^-- end (eof|reset)
	log    small.example:%p/ HTTP/1.1" (200|403) .*rule=-e:2
END
	served
	for url in x y z; do
		grep -r "big.example:[0-9]*/$url" cache > /dev/null &&
			fail "what was cut off is stored"
	done
	rows <<'END'
rule deny size >1000 host big.example
rule deny size <10 host small.example
rule deny size >2K host k.example
ask GET http://big.example/ > 200 Content-Length: 1000 = allow
ask GET http://big.example/ > 200 Content-Length: 1001 = deny 403 at -e:1
ask GET http://small.example/ > 200 Content-Length: 10 = allow
ask GET http://small.example/ > 200 Content-Length: 9 = deny 403 at -e:2
ask GET http://k.example/ > 200 Content-Length: 2000 = allow
ask GET http://k.example/ > 200 Content-Length: 2048 = allow
ask GET http://k.example/ > 200 Content-Length: 2049 = deny 403 at -e:3
ask GET http://k.example/ > 200 = open
given > 200 Content-Length: 2
yes size <10 | size >1
no size <2 | size >2 | size <1 | size >1K | size >1M | size >1G
END
}

# The harmless text that all scanners know, in two halves for them not to find
# it here: $eicar as it is, $eicar_play as plays and quotes have it.
eicar_text() {
	eicar_1='X5O!P%@AP[4\PZX54(P^)7CC)7}$EIC'
	eicar_2='AR-STANDARD-ANTIVIRUS-TEST-FILE!$H+H*'
	eicar=$eicar_1$eicar_2
	eicar_1_play='X5O!P%@AP[4\\PZX54(P^)7CC)7}$EIC'
	eicar_play=$eicar_1_play$eicar_2
}

# The last byte of that text, which nothing else has, has not come to the client.
kept_back() {
	! grep -F '*' "c$plays" > /dev/null ||
		fail "${play_title-}: the text has passed"
}

test_rules_body() { # body: cut before the text is whole, wherever it is split
	eicar_text
	start_rules -c "$T/cache" <<END
deny "a virus" body "$eicar_play" host virus.example
deny body aaab "ab ba" host odd.example
END
	head='HTTP/1.1 200 OK\nCache-Control: max-age=999\n'
	play -n 'by length, one byte at a time' <<END
	origin head ; send ${head}Content-Length: 78\n\nfirst ; stall 200
	origin chop 1 1 $eicar_play ; send later
	ask    http://virus.example:%p/1 = 200
	sees~  ^first
	sees~  ^-- end (eof|reset) answer
	log    /1 HTTP/1.1" 200 [0-9]+ .* end=rule
END
	kept_back
	last_line ' rule=rules:1( |$)' ' why="'
	play -n 'by length, all at once' <<END
	origin head ; send ${head}Content-Length: 68\n\n$eicar_play
	client send GET http://virus.example:%p/2 HTTP/1.1\nHost: x\n\n ; eof
	log    /2 HTTP/1.1" (200|403) [0-9]+ .*rule=rules:1
END
	kept_back
	n1=$(printf %x ${#eicar_1})
	n2=$(printf %x ${#eicar_2})
	play -n 'across chunks' <<END
	origin head ; send ${head}Transfer-Encoding: chunked\n\n5\nfirst\n
	origin stall 200 ; send $n1\n$eicar_1_play\n ; stall 50
	origin send $n2;x=y\n$eicar_2\n0\n\n
	ask    http://virus.example:%p/3 = 200 cut
	sees!~ ^0+$
	log    /3 HTTP/1.1" 200 [0-9]+ .* end=rule
	do kept_back
	== chunks of one byte
	origin head
	origin send ${head}Transfer-Encoding: chunked\\n\\n
	origin stall 100
	origin chop 7 1 $(printf %s "$eicar" | awk '{
		for (i = 1; i <= length($0); i++) {
			c = substr($0, i, 1)
			printf "1\\n%s\\n", c == "\\" ? "\\\\" : c
		} }')0\\n\\n
	client send GET http://virus.example:%p/4 HTTP/1.1\\nHost: x\\n\\n
	client answer
	sees~  ^-- end (eof|reset)
	log    /4 HTTP/1.1" 200 [0-9]+ .* end=rule
	do kept_back
	== to the close, to a 1.0 client: only a reset tells
	origin head ; send ${head}\nfirst ; stall 200 ; send $eicar_play
	ask    1.0 http://virus.example:%p/5 = 200
	sees~  ^-- end reset
	log    /5 HTTP/1.0" 200 [0-9]+ .* end=rule
END
	kept_back
	for text in aaaab 'xaaab' 'xab ba' 'aaab ba'; do
		play -n "a beginning before the text: $text" <<END
		origin head
		origin send ${head}Content-Length: $((${#text} + 5))\n\nfirst
		origin stall 100 ; send $text
		ask    http://odd.example:%p/6 = 200 cut
		log    /6 HTTP/1.1" 200 [0-9]+ .* end=rule
END
	done
	grep -l -r 'example:[0-9]*/[1-6]' cache > stored
	[ ! -s stored ] || fail "what was cut off is stored: $(cat stored)"
	play -n 'what only begins like it passes whole' <<END
	origin head ; send ${head}Content-Length: 40\n\nfirst ; stall 100
	origin chop 3 1 ${eicar_1_play}last
	reply  200 Content-Length: ${#eicar_2} | $eicar_2
	ask    http://virus.example:%p/7
	ask    http://virus.example:%p/8
	sees~  ^HTTP/1.1 200
	sees~  ${eicar_2%\$*}
	sees#  2 HTTP/1.1 200
	log    /7 HTTP/1.1" 200 40 .* end=done
	log    /8 HTTP/1.1" 200 37 .* end=done
END
	grep -F "first${eicar_1}last" "c$plays" > /dev/null ||
		fail "the text has changed: $("$peer" show < "c$plays" | tail -n 3)"
	start_ruled -e 'deny not body licence'
	play -n 'not: with the text' <<'END'
	reply  200 Transfer-Encoding: chunked | 5\nfirst\n
	origin stall 100 ; send 9\na licence\n ; stall 100 ; send 4\nlast\n0\n\n
	ask    /
	log    200 18 .* end=done
	== not: without it
	reply  200 Transfer-Encoding: chunked | 5\nfirst\n
	origin stall 100 ; send 4\nlast\n0\n\n
	client send GET http://%O/ HTTP/1.1\nHost: x\n\n ; eof
	sees!~ ^0+$
	log    " (200|403) .*rule=-e:1
END
	last_line ' end=rule|" 403 '
}

test_rules_body_passes() { # body: what no line concerns passes
	eicar_text
	start_rules <<END
deny body "$eicar_play" host virus.example
END
	play -n 'a HEAD, a 304, a 204' <<END
	reply  200 Content-Length: 5000
	reply  304 Not\nContent-Length: 5000
	reply  204 No
	ask    HEAD http://virus.example:%p/ = 200
	ask    http://virus.example:%p/ = 304
	ask    http://virus.example:%p/ = 204
	== another host
	reply  200 Content-Length: 68 | $eicar_play
	ask    http://other.example:%p/9
	log    /9 HTTP/1.1" 200 68 .* end=done
END
	grep -F "$eicar" "c$plays" > /dev/null || fail "the text has changed"
}

test_rules_body_borders() { # body: a text across the border of two buffers
	eicar_text
	printf 'deny body %s\n' "$eicar" > first
	start_rules < first
	beginning=$(printf %s "$eicar_play" | head -c 31)
	for at in $((buffer - 68)) $((buffer - 67)) $((buffer - 35)) \
	    $((buffer - 1)) "$buffer" $((buffer + 1)) $((buffer * 2 - 20)) \
	    $((buffer * 3 - 300)) 65502 65535 1000003; do
		cat <<END
	== behind $at bytes
	reply  200 Content-Length: $((at + 200068))
	origin fill $at ; send $eicar_play ; stuff 200000
	ask    / = 200 cut
	sees!~ [*]
	log    " 200 [0-9]+ .* end=rule
	== chunked, behind $at bytes
	reply  200 Transfer-Encoding: chunked
	origin send $(printf %x $((at + 30)))\n ; fill $at
	origin send $beginning
	origin send \n400\n${eicar_play#"$beginning"}
	origin stuff 200000
	ask    / = 200 cut
	sees!~ (^0+$|[*])
	log    " 200 [0-9]+ .* end=rule
END
	done > borders
	play 'megabytes without it' <<END
	reply  200 Content-Length: 3000000
	origin fill 3000000
	client send GET http://%O/ HTTP/1.1\nHost: x\n\n ; until \n\n
	client skip 3000000
	log    " 200 3000000 .* end=done
	$(cat borders)
END
}

test_rules_body_encoding() { # body: Accept-Encoding is taken away where it may concern
	start_ruled -e 'deny body virus host virus.example'
	plain_origin o
	for host in virus other; do
		want 200 GET http://$host.example:%p/$host \
		    'Accept-Encoding: gzip\nAccept: */*\naccept-encoding: br\n'
	done
	cat o.[0-9] | "$peer" show > heads
	awk '/^GET/ { at = $2 } tolower($0) ~ /^accept-encoding/ { n[at]++ }
	END { exit n["/virus"] + 0 != 0 || n["/other"] != 2 }' heads ||
		fail "the origin gets: $(tr '\n' '|' < heads)"
	counts 2 heads '^Accept: '
}

test_rules_via() { # via: by host, http and socks5; direct for the rest
	origin h 'replies 200 X-By: h | ok'
	h=$origin
	origin s <<'END'
want 3 ; send \x05\0 ; want 19 ; send \x05\0\0\x01\x7f\0\0\x01\x12\x34
reply 200 X-By: s | ok
loop
---
want 3 ; send \x05\0 ; want 19 ; send \x05\0\0\x01\x7f\0\0\x01\x12\x34pong
eof
END
	s=$origin
	start_ruled -e "via socks5://$s host .onion" \
	    -e "direct host near.intern.example" \
	    -e "via http://$h host .intern.example url ^http://par.example/[a-z]*\$"
	: > names
	play -n 'socks' <<END
	ask    http://abcdef.onion/a
	ask    CONNECT abcdef.onion:443
	client until pong
	sees~  ^HTTP/1.1 200
	sees   X-By: s
	sees   pong
	log    "GET http://abcdef.onion/a HTTP/1.1" 200 2 .* server=$s end=done
	log    "CONNECT abcdef.onion:443 HTTP/1.1" 200 .* server=$s end=
END
	got s <<'END'
= \x05\x01\x00\x05\x01\x00\x03\x0cabcdef.onion\x00PGET /a HTTP/1.1
= \x05\x01\x00\x05\x01\x00\x03\x0cabcdef.onion\x01\xbb
END
	[ ! -s names ] || fail "looked up: $(cat names)"
	start_ruled -e "direct host near.intern.example" \
	    -e "via http://$h host .intern.example" \
	    -e "via http://$h url ^http://par.example:[0-9]*/via"
	plain_origin
	: > names
	play -n 'http' <<END
	ask    http://far.intern.example/a
	ask    CONNECT far.intern.example:443
	sees   X-By: h
	log    "GET http://far.intern.example/a HTTP/1.1" 200 2 .* server=$h end=done
	log    "CONNECT far.intern.example:443 HTTP/1.1" 200 .* server=$h end=
END
	got h <<'END'
= GET http://far.intern.example/a HTTP/1.1
= CONNECT far.intern.example:443 HTTP/1.1
END
	[ ! -s names ] || fail "looked up: $(cat names)"
	want 200 GET http://near.intern.example:%p/ '' " server=$origin "
	# Kept connections serve their own route only.
	for path in /direct /via /direct /via; do
		want 200 GET http://par.example:%p$path
		case $path in
		/via) last_line " server=$h " ;;
		*) last_line " server=$origin " ;;
		esac
	done
}

# A port of loopback on which nobody listens: sets $dead.
dead_port() {
	nobody
	dead=$origin
}

test_rules_via_next() { # via: the next parent if one can't be reached, or shakes no hands; direct as last
	dead_port
	origin h 'replies 200 X-By: h | ok'
	h=$origin
	start_rules <<END
via http://$dead http://$h host two.example
via socks5://$dead http://$h host odd.example
via http://$dead direct host last.example
via http://$dead socks5://$dead host none.example
via http://$dead host one.example
END
	plain_origin
	for host in two odd; do
		want 200 GET http://$host.example:%p/
		has a '^X-By: h'
		last_line " server=$h "
		want 200 CONNECT $host.example:443 '' '"CONNECT ' " server=$h "
	done
	want 200 GET http://last.example:%p/ '' " server=$origin "
	want 200 POST http://last.example:%p/ 'Content-Length: 0\n'
	for host in none one; do
		want 502 GET http://$host.example:%p/ '' ' why="'
	done
	want 200 GET http://other.example:%p/
	origin s <<'END'
want 3 ; send HTTP/1.1 400 Bad\n\n ; eof
---
want 3 ; send \x05\xff ; eof
---
want 3 ; close
---
want 3 ; send \x05\0 ; want 10 ; send \x05\x05\0\x01\0\0\0\0\0\0 ; eof
END
	for n in protocol login close; do
		start_proxy -e "via socks5://$origin http://$h"
		want 200 GET http://a.example/ '' " server=$h "
	done
	# One that says that the server is gone does its work.
	start_proxy -e "via socks5://$origin http://$h"
	want 502 GET http://192.0.2.7/ '' ' why="'
}

# No byte has reached the origin.
untouched() {
	for untouched_file in "$1".[0-9] "$1".[0-9][0-9]; do
		[ ! -s "$untouched_file" ] || fail "${play_title-}:" \
		    "the server got $(head -c 100 "$untouched_file" | "$peer" show)"
	done
}

test_rules_via_judged() { # via: what goes another way in the end is judged by its address
	dead_port
	plain_origin o
	start_ruled -e "via http://$dead direct host a.example 127.0.0.1" \
	    -e "via http://$dead direct host b.example" \
	    -e "deny 451 address 127.0.0.0/8 not host b.example"
	for url in http://a.example:%p/ http://%O/; do
		want 451 GET "$url"
	done
	for target in a.example:%p %O; do
		want 451 CONNECT "$target"
	done
	untouched o
	want 200 GET http://b.example:%p/
	me=$("$peer" myself) || return 0
	need_me
	start_ruled -e "via http://$dead direct" -e "allow client $me"
	rm -f o.*
	plain_origin o
	for url in http://a.example:%p/ http://127.0.0.1:%p/; do
		want 403 GET "$url"
	done
	untouched o
}

test_rules_via_option() { # -x is a route behind those of the rules
	origin h 'replies 200 X-By: h | ok'
	h=$origin
	start_ruled -x "http://$h" -e 'direct host .near.example'
	plain_origin
	want 200 GET http://a.near.example:%p/
	lacks a X-By
	want 200 GET http://far.example/
	has a '^X-By: h'
}

test_rules_from() { # from: the address that servers see
	export PEER_NOTES=1
	need_second_loopback
	start_ruled -e 'from 127.0.0.2 url /second' \
	    -e 'from 127.0.0.1 host first.example'
	plain_origin o
	# What is kept from one address does not serve another.
	for path in / /second / /second; do
		want 200 GET http://x.example:%p$path
	done
	for file in o.[0-9]; do
		want=127.0.0.1
		grep '^GET /second' "$file" > /dev/null && want=127.0.0.2
		[ "$(cat "$file.peer")" = "$want" ] ||
			fail "$file comes from $(cat "$file.peer"), not $want"
		grep '^GET /second' "$file" > /dev/null &&
		    grep '^GET / ' "$file" > /dev/null &&
			fail "one connection for both"
	done
	start_ruled -b 127.0.0.1 -e 'from 127.0.0.2 host second.example'
	for row in 'second 127.0.0.2' 'first 127.0.0.1'; do
		plain_origin "${row% *}"
		asks CONNECT "${row% *}.example:%p"
		wait_for 5 "[ -s ${row% *}.1.peer ]" || fail "${row% *}: not reached"
		[ "$(cat "${row% *}.1.peer")" = "${row#* }" ] ||
			fail "CONNECT: ${row% *} comes from $(cat "${row% *}.1.peer")"
	done
	have_ipv6 || return 0
	plain_origin six -a ::1
	start_ruled -e 'from 127.0.0.2 url /four' \
	    -e 'from 127.0.0.2 ::1 url /both'
	want 502 GET http://%O/four
	want 200 GET http://%O/both
	has six.1.peer '^::1$'
}

test_rules_nocache() { # nocache: neither answered from there nor stored
	start_ruled -c "$T/cache"
	plain='HTTP/1.1 200 OK\nCache-Control: max-age=999\nContent-Length: 2\n\nok'
	origin o "head ; send $plain ; loop"
	want 200 GET http://%O/one
	want 200 GET http://%O/one '' ' hit=fresh '
	log_from=$(($(wc -l < log) + 1))
	start_ruled -c "$T/cache" -e 'nocache not url /three'
	for path in /one /two /three /one /two /three; do
		want 200 GET http://%O$path
	done
	logged <<'END'
#2 /one HTTP
#2 /two HTTP
!~ /(one|two) HTTP.*(hit=|stored)
#1 /three HTTP.* hit=fresh
END
	grep -r '/two' cache > /dev/null && fail "there is an entry"
	cat o.[0-9]* > all
	for row in 3/one 2/two 1/three; do
		[ "$(grep -a -c "^GET /${row#*/} " all)" = "${row%/*}" ] ||
			fail "not asked as often as it should: $row"
	done
}

test_rules_cache_size() { # nocache and cache by size: decided when the head has come
	start_ruled -c "$T/cache" -e 'nocache size >5 host a.test' \
	    -e 'cache 2h not size >5 host b.test' -e 'cache 1h'
	play -n 'a length that is not told is above no size' <<'END'
	reply  200 Transfer-Encoding: chunked | 8\nchunked\l\n0\n\n
	ask    http://a.test:%p/
	ask    http://a.test:%p/
	sees#  2 ^chunked
	gets#  1 ^GET
	log    200 8 .* miss=stored
	log    200 8 .* hit=fresh
	== nor not above it
	reply  200 Transfer-Encoding: chunked | 3\nok\l\n0\n\n
	ask    http://b.test:%p/
	ask    http://b.test:%p/
	sees~  ^Cache-Status: .*ttl=(3600|359[0-9])
	log    200 3 .* miss=stored
	log    200 3 .* hit=fresh
	== a length that is told
	reply  200 | large\l
	reply  200 | tiny\l
	ask    http://a.test:%p/
	ask    http://a.test:%p/
	ask    http://a.test:%p/
	sees#  1 ^large
	sees#  2 ^tiny
	log    200 6 .* miss=rule
	log    200 5 .* miss=stored
	log    200 5 .* hit=fresh
END
}

test_rules_cache() { # cache DURATION: in place of the lifetime that is told or guessed
	start_cache -v -e 'cache 1h host 127.0.0.1'
	keeps 'no lifetime' '200 OK' ''
	keeps 'max-age=0' '200 OK' 'Cache-Control: max-age=0\n'
	keeps 's-maxage=0' '200 OK' 'Cache-Control: s-maxage=0, max-age=5\n'
	keeps 'Expires in the past' '200 OK' 'Expires: 0\n'
	has "c$plays" '^Cache-Status: .*; ttl=[0-9]*'
	for what in private no-store 'private, max-age=99' 'no-store, max-age=99'; do
		keeps_not "${what%%,*}" '200 OK' "Cache-Control: $what\\n"
	done
	for what in no-cache 'no-cache, max-age=99'; do
		play -n "$what" <<END
		replies 200 Cache-Control: $what | ok\l
		ask    /
		ask    /
		sees#  2 ^ok
		gets#  2 ^GET /
		log!   hit=fresh
END
	done
	keeps_not authorization '200 OK' '' 'Authorization: Basic eDp5\n' again
	keeps_not set-cookie '200 OK' 'Set-Cookie: a=b\n'
	keeps 'a cookie, public' '200 OK' 'Set-Cookie: a=b\nCache-Control: public, max-age=99\n'
	stop_proxy
	start_cache -e 'cache 1s url /short' -e 'cache 7d url /long'
	origin o 'replies 200 Cache-Control: max-age=9999 | ok'
	for path in /short /long /other; do
		want 200 GET http://%O$path
	done
	"$peer" sleep 2200
	for path in /short /long /other; do
		want 200 GET http://%O$path
	done
	cat o.[0-9]* > all
	counts 2 all '^GET /short'
	counts 1 all '^GET /long'
	counts 1 all '^GET /other'
	gives 200 http://%O/long
	ttl=$(sed -n 's/^Cache-Status:.*ttl=\([0-9]*\).*/\1/p' a)
	[ "${ttl:-0}" -gt 604000 ] && [ "$ttl" -le 604800 ] ||
		fail "7d is ${ttl:-?} seconds"
}

test_rules_rewrite_request() { # set, add, unset: what the server gets
	rows <<'END'
rule set request X-One 1 host a.example
rule set request x-set "new value" host a.example
rule add request X-Add added host a.example
rule unset request Referer X-Forwarded-* X-None host a.example
rule unset request X-Gone host a.example
rule add request X-Gone back host a.example
rule set request X-Other 1 host other.example
rule unset request Via host c.example
rule unset request Cookie method POST
sends GET http://a.example/ X-Set: 1\nX-Keep: 1\nx-SET: 2\nX-Add: a\nReferer: http://x/\nx-forwarded-for: 1\nX-Forwarded-Proto: x\nX-Forwarded: 1\nX-Gone: 1\nCookie: a=b\nx-gone: 2\nX-ADD: b = X-Keep: 1\nX-Add: a\nX-Forwarded: 1\nCookie: a=b\nX-ADD: b\nX-One: 1\nx-set: new value\nX-Add: added\nX-Gone: back\nVia: 1.1 p
sends GET http://b.example/ X-Set: 1\nReferer: http://x/\nX-Forwarded-For: 1\nX-Gone: 1\nCookie: a=b = X-Set: 1\nReferer: http://x/\nX-Forwarded-For: 1\nX-Gone: 1\nCookie: a=b\nVia: 1.1 p
sends POST http://b.example/ Cookie: a=b\nContent-Length: 0 = Content-Length: 0\nVia: 1.1 p
sends GET http://c.example/ Via: 1.0 fred = -
END
	start_ruled -e 'set request X-One 1' \
	    -e 'unset request Referer X-Forwarded-*' \
	    -e 'unset request Via host c.example'
	play 'on the wire' <<'END'
	replies 200 | ok
	ask    http://a.example:%p/ X-Keep: 1\nReferer: http://x/\nx-forwarded-for: 1\nCookie: a=b
	ask    http://c.example:%p/ Via: 1.0 fred
	sees~  ^HTTP/1.1 200
	gets   GET / HTTP/1.1
	gets+  Host: a.example:%p
	gets+  X-Keep: 1
	gets+  Cookie: a=b
	gets+  X-One: 1
	gets#  1 ^Via: 
	gets   GET / HTTP/1.1
	gets!~ ^([Xx]-[Ff]orwarded-|Referer)
END
}

test_rules_rewrite_order() { # set, add, unset: all lines that hold apply, in their order
	rows <<'END'
rule set request X-Twice first
rule set request X-Twice second
rule add request X-Lost in
rule unset request x-lost
rule set request X-Set-Lost in
rule unset request X-Set-*
rule unset request X-Back
rule set request X-Back again
rule add request X-Both 1
rule add request X-Both 2
rule set response X-Twice first
rule set response x-twice second
rule add response X-Lost in
rule unset response X-Lost
sends GET http://a/ X-Both: 0\nX-Lost: old = X-Both: 0\nX-Twice: second\nX-Back: again\nX-Both: 1\nX-Both: 2\nVia: 1.1 p
gives > 200 X-Twice: old\nX-Lost: old\nContent-Length: 2 = Content-Length: 2\nx-twice: second\nVia: 1.1 p
rule set request X-A 1
rule set request X-A 2
rule add request X-A 3
rule set request X-B 1
rule unset request X-B X-C
rule add request X-C 1
rule set response X-D 1
rule unset response X-*
rule add response X-E 1
sends GET http://a/ X-A: 0\nX-B: 0\nX-C: 0 = X-A: 2\nX-A: 3\nX-C: 1\nVia: 1.1 p
gives > 200 X-D: 0\nX-E: 0\nContent-Length: 2 = Content-Length: 2\nX-E: 1\nVia: 1.1 p
# A star leaves alone what frames or routes.
rule unset response C* X-*
rule unset request C* E* T*
gives > 206 Content-Type: text/x\nX-A: b\nContent-Range: bytes 0-1/9\nContent-Length: 2 = Content-Range: bytes 0-1/9\nContent-Length: 2\nVia: 1.1 p
sends GET http://a/ Cookie: c\nRange: bytes=0-1 = Range: bytes=0-1\nVia: 1.1 p
sends POST http://a/ Trailer: x\nExpect: 100-continue\nContent-Length: 2 = Trailer: x\nExpect: 100-continue\nContent-Length: 2\nVia: 1.1 p
END
}

test_rules_rewrite_response() { # set, add, unset: what the client gets
	start_rules -c "$T/cache" <<'END'
set response Server hidden host a.example
add response X-Add "in the end" host a.example
unset response Set-Cookie X-Powered-* host a.example
set response X-Html yes host a.example type text/html
set response X-Missing yes host a.example status 404
unset response X-If host a.example field response X-Why ^b
END
	play -n 'for this host, a miss and a hit' <<'END'
	reply  200 Cache-Control: public, max-age=99\nContent-Type: text/html\nserver: one\nServer: two\nX-Add: a\nSet-Cookie: a=b\nset-cookie: c=d\nX-Powered-By: x\nX-Powered: 1\nX-If: 1\nX-Why: bc | ok
	ask    http://a.example:%p/
	ask    http://a.example:%p/
	sees#  2 ^Server: hidden$
	sees#  2 ^[Ss]erver:
	sees#  4 ^X-Add: 
	sees#  2 ^X-Add: in the end$
	sees#  2 ^X-Powered: 1$
	sees#  2 ^X-Html: yes$
	sees!~ ^([Ss]et-[Cc]ookie|X-Powered-By|X-Missing|X-If)
	log    miss=stored
	log    hit=fresh
END
	play 'status and host count' <<'END'
	reply  404 No\nServer: one\nX-If: 1 | ok
	reply  404 No\nServer: one\nSet-Cookie: a=b | ok
	ask    http://a.example:%p/
	ask    http://b.example:%p/
	sees   X-If: 1
	sees   Server: hidden
	sees   Server: one
	sees   Set-Cookie: a=b
	sees#  1 ^X-Missing: yes$
	sees!~ ^X-Html
END
}

test_rules_rewrite_ours() { # set and unset: also fields that the proxy adds itself
	start_rules -c "$T/cache" <<'END'
set response Date "Thu, 01 Jan 1970 00:00:00 GMT" host set.example
set response Age 7 host set.example
set response Cache-Status "\"x\"" host set.example
set response Via "1.1 x" host set.example
unset response Date Age Cache-Status Via host unset.example
END
	play -n 'a response without Date, a hit' <<'END'
	reply  200 | ok
	reply  200 Cache-Control: max-age=99 | ok
	ask    http://set.example:%p/ = 200
	ask    http://set.example:%p/hit = 200
	ask    http://set.example:%p/hit = 200 | ok
	sees#  3 ^Date: 
	sees#  3 ^Age: 7
	sees#  3 ^Age: 
	sees#  3 ^Cache-Status: 
	sees#  3 ^Via: 
	log    hit=fresh
	== none of them
	reply  200 | ok
	reply  200 Cache-Control: max-age=99 | ok
	ask    http://unset.example:%p/ = 200
	ask    http://unset.example:%p/hit = 200
	ask    http://unset.example:%p/hit = 200 | ok
	sees!~ ^(Date|Age|Cache-Status|Via):
	sees#  3 ^Content-Length: 2
	log    hit=fresh
END
}

test_rules_rewrite_trailers() { # set and unset: trailers are dropped; add: not
	start_rules <<'END'
set request X-A b host set.example
unset request X-B host unset.example
unset response X-B host unset.example
set response X-A b host set.example
set request X-A b host other.example
END
	for host in set unset; do
		play -n "$host" <<END
		origin head ; until \n0\n ; until \n ; stall 50
		origin say 200 Transfer-Encoding: chunked | 5\nhello\n0\nX-B: down\nX-C: down\n\n
		ask    POST http://$host.example:%p/ Transfer-Encoding: chunked | 4\ngood\n0\nX-B: up\nX-C: up\n\n = 200
		sees   hello
		sees   0
		sees!~ ^X-[BC]: 
		gets   good
		gets!~ ^X-[BC]: 
		log    200 5 .* end=done
END
	done
	play -n 'of others they stay' <<'END'
	origin head ; until X-C: up\n\n
	origin say 200 Transfer-Encoding: chunked | 5\nhello\n0\nX-B: down\nX-C: down\n\n
	ask    POST http://plain.example:%p/ Transfer-Encoding: chunked | 4\ngood\n0\nX-B: up\nX-C: up\n\n
	sees   X-B: down
	sees+  X-C: down
	gets   X-B: up
	gets+  X-C: up
END
}

test_rules_anonymous() { # -a: the last of all rewriting, with rules too
	start_ruled -a -e 'set request User-Agent mine' -e 'set request X-A b' \
	    -e 'add request X-Forwarded-For 10.0.0.1'
	play 'unset wins' <<'END'
	reply  200 | ok
	ask    / From: a@b\nReferer: http://x/\nUser-Agent: play\nX-Keep: 1
	gets   GET / HTTP/1.1
	gets#  1 ^X-A: b$
	gets#  1 ^X-Keep: 1$
	gets!~ ^(Via|From|Referer|User-Agent|X-Forwarded-For):
END
}

test_rules_guards() { # who is not local: loopback and CONNECT ports are guarded
	rows <<'END'
rule allow client 192.0.2.1
ask GET http://198.51.100.7/ client 192.0.2.1 = allow at -e:1
ask GET http://127.0.0.1/ client 192.0.2.1 | GET http://127.1.2.3/ client 192.0.2.1 = deny 403 at built-in:1
ask GET http://0.0.0.0/ client 192.0.2.1 | GET http://169.254.169.254/ client 192.0.2.1 = deny 403 at built-in:1
ask GET http://224.0.0.1/ client 192.0.2.1 | GET http://255.255.255.255/ client 192.0.2.1 = deny 403 at built-in:1
ask GET http://[::1]/ client 192.0.2.1 | GET http://[::]/ client 192.0.2.1 = deny 403 at built-in:1
ask GET http://[fe80::1]/ client 192.0.2.1 | GET http://[ff02::1]/ client 192.0.2.1 = deny 403 at built-in:1
ask GET http://[::ffff:127.0.0.1]/ client 192.0.2.1 = deny 403 at built-in:1
ask CONNECT 198.51.100.7:80 client 192.0.2.1 = deny 403 at built-in:2
ask CONNECT 198.51.100.7:443 client 192.0.2.1 = allow at -e:1
rule allow client 192.0.2.1 address 127.0.0.1 port 8080
rule allow client 192.0.2.1 method CONNECT port 8443
rule guard
rule allow client 192.0.2.1
ask GET http://127.0.0.1:8080/ client 192.0.2.1 = allow at -e:1
ask GET http://near:8080/ client 192.0.2.1 address 127.0.0.1 = allow at -e:1
ask GET http://127.0.0.1:8079/ client 192.0.2.1 | GET http://127.0.0.3:8080/ client 192.0.2.1 = deny 403 at built-in:1
ask CONNECT 198.51.100.7:8443 client 192.0.2.1 = allow at -e:2
ask CONNECT 198.51.100.7:1 client 192.0.2.1 = deny 403 at built-in:2
ask GET http://198.51.100.7/ client 192.0.2.1 = allow at -e:4
END
	need_me
	plain_origin near
	near=$origin_port
	start_ruled -e "allow client $me"
	for host in 127.0.0.1 near.example 127.1 2130706433 0x7f000001 0177.0.0.1; do
		want 403 GET "http://$host:$near/" '' ' rule=built-in:1( |$)' ' why="'
		has a 'error=destination_ip_prohibited'
	done
	untouched near
	want 403 CONNECT "$me:1" '' ' rule=built-in:2( |$)'
	plain_origin far -a "$me"
	want 200 GET http://%O/ '' ' rule=-e:1( |$)'
	start_ruled -e "allow client $me address 127.0.0.1 port $near" -e guard
	want 200 GET "http://near.example:$near/"
}

test_rules_nobody_else() { # without any line: this machine only
	need_me
	plain_origin far -a "$me"
	start_proxy
	want 403 GET http://%O/
	grep -F "allow client $me" a > /dev/null ||
		fail "the page does not tell the line to add: $(tail -n 3 a)"
	last_line "^$me - - " ' rule=built-in:4( |$)' ' why="'
	want 403 CONNECT "$me:443"
	untouched far
	unset PEER_FROM
	want 200 GET http://%O/
	want 200 CONNECT %O
	logged <<'END'
#2 ^127.0.0.1 .* 200 
!~ ^127.0.0.1 .* rule=
END
}

test_rules_try() { # -T: what would happen, and the exit status
	people
	cat > rules <<'END'
users people
deny 451 "no films" host films.example
deny type video/* host video.example
allow client 10.0.0.0/8
allow user alice
deny method POST host q.example
via socks5://me:s3cret@127.0.0.1:9050 host .onion
via http://127.0.0.1:3128 direct host via.example
END
	tries -f rules <<'END'
http://example.com/ = 0 allow built-in:3 direct
http://video.example/ = 3 undecided, it needs the response's type rules:3 direct
http://films.example/ = 1 deny rules:2
https://x.onion/ client 10.1.2.3 = 0 allow rules:4 via socks5://127.0.0.1:9050 rules:7
http://example.com/ client 192.0.2.1 = 1 deny built-in:4
http://192.0.2.9/ client 192.0.2.1 user alice = 0 allow rules:5
http://192.0.2.9/ user bob client 192.0.2.1 = 1 deny
http://q.example/ method POST = 1 deny rules:6
http://q.example/ = 0 allow built-in:3
http://via.example/ = 0 allow built-in:3 via http://127.0.0.1:3128 rules:8
nonsense = 2
http://x/ client x = 2
http://x/ colour red = 2
http://x/ client = 2
ftp://x/ = 2
END
	exits 0 -f rules -T http://example.com/ -T 'https://x.onion/ client 10.1.2.3'
	counts 2 out '^http'
	[ "$(sed -n 1p out)" = http://example.com/ ] || fail "two: $(cat out)"
	has out '^https://x.onion/ client 10.1.2.3$'
	has out '^	access: allow (built-in:3: allow client local)$'
	lacks out s3cret
	exits 1 -f rules -T http://films.example/ -T http://example.com/
	has out '^	access: deny.*rules:2: deny 451'
	tries -e 'deny port 8443' -e 'deny url ^example.com:443$' \
	    -e 'deny host 2001:db8::1 192.0.2.9 port 443' \
	    -e 'deny url ^http://example.com/a$' <<'END'
https://example.com:8443/ = 1 deny -e:1
https://example.com/ = 1 deny -e:2
https://example.com = 1 deny -e:2
https://example.com#x:1 = 1 deny -e:2
https://[2001:db8::1]/ = 1 deny -e:3
https://[2001:db8::1]:443/x?y:z = 1 deny -e:3
https://192.0.2.9/a:b = 1 deny -e:3
https://bob:pw@[2001:db8::1]/ = 1 deny -e:3
http://bob:pw@example.com/a#b = 1 deny -e:4
END
	tries -e 'deny client 127.0.0.1' <<'END'
http://example.com/ = 1 deny -e:1
http://example.com/ client ::1 = 0 allow
http://example.com/  client   ::1 = 0 allow
http://example.com/ user = 2
http://example.com/ method = 2
http://example.com/ client = 2
END
	tries -e 'deny port x' <<'END'
http://example.com/ = 2
END
	tries -n -e 'deny host a' <<'END'
http://a/ = 1 deny -e:1
END
}

test_rules_try_open() { # -T: the edges of a network, the open verdicts, the worst of several, the parent
	tries -e 'allow client 192.0.2.128/25 2001:db8::/33' <<'END'
http://192.0.2.1/ client 192.0.2.128 = 0 allow -e:1
http://192.0.2.1/ client 192.0.2.127 = 1 deny built-in:4
http://192.0.2.1/ client 2001:db8:7fff:: = 0 allow -e:1
http://192.0.2.1/ client 2001:db8:8000:: = 1 deny built-in:4
END
	# From this machine is who comes from loopback.
	tries <<'END'
http://192.0.2.1/ client 127.0.0.1 = 0 allow built-in:3
http://192.0.2.1/ client 127.9.9.9 = 0 allow built-in:3
http://192.0.2.1/ client ::1 = 0 allow built-in:3
http://192.0.2.1/ client 10.0.0.1 = 1 deny built-in:4
http://192.0.2.1/ client 2001:db8::1 = 1 deny built-in:4
END
	tries -e 'deny host a status 500' -e 'deny host b not type a/b status 500' \
	    -e 'deny host c size >10' -e 'deny host d field response X-A b' \
	    -e 'deny host e body x' -e 'deny host f' <<'END'
http://a/ = 3 undecided, it needs the response's status -e:1
http://b/ = 3 undecided, it needs the response's type -e:2
http://c/ = 3 undecided, it needs the response's size -e:3
http://d/ = 3 undecided, it needs the response's field -e:4
http://e/ = 3 undecided, it needs the response's body -e:5
END
	for row in '3 a c' '1 a b' '1 b a'; do
		run_proxy -e 'deny type a/b host a' -e 'deny host b' \
		    -T "http://$(echo "$row" | cut -c 3)/" -T "http://${row##* }/"
		[ $status = "${row%% *}" ] || fail "$row: exit status $status"
	done
	tries -e 'via socks5://127.0.0.1:9050 host .onion' <<'END'
https://x.onion/ = 0 allow built-in:3 via socks5://127.0.0.1:9050 -e:1
END
	tries -x http://127.0.0.1:1 -e 'deny address 127.0.0.0/8' <<'END'
http://localhost/ = 0 allow built-in:3 via http://127.0.0.1:1 -x
END
	tries -x 'socks5://me:cret@[::1]:1' -e 'direct host x.test' <<'END'
https://[2001:db8::1]/ = 0 allow built-in:3 via socks5://[::1]:1 -x
http://x.test/ = 0 allow built-in:3 direct -e:1
END
	lacks out cret
	tries -e 'deny address 127.0.0.0/8' <<'END'
http://localhost/ = 1 deny -e:1
http://0.0.0.0/ = 1 deny -e:1
END
}

test_rules_try_lookup() { # -T: a name is looked up only if a line asks for its address
	NAME_ADDRESSES=192.0.2.7
	our_names
	: > names
	tries -e 'deny host a.example' -e 'deny type text/html a/b' -e 'deny body x' <<'END'
http://a.example/ = 1 deny
http://b.example/ = 3 undecided, it needs the response's type -e:2
https://g.example/ = 0 allow built-in:3
END
	tries -e 'deny host e.example' -e 'deny address 192.0.2.0/24' <<'END'
http://e.example/ = 1 deny -e:1
END
	tries -e 'via http://p address 10.0.0.0/8' -e 'deny 451 address 192.0.2.7' \
	    -e deny <<'END'
http://g.example/ = 1 deny -e:3 undecided, it needs the server's address -e:1
END
	[ ! -s names ] || fail "looked up: $(cat names)"
	tries -e 'deny address 192.0.2.0/24' <<'END'
http://c.example/ = 1 deny -e:1
END
	has names c.example
	tries -e 'deny address 10.0.0.0/8' <<'END'
http://d.example/ = 0 allow
END
	NAME_ADDRESSES='192.0.2.7 192.0.2.8'
	tries -e 'deny address 192.0.2.7' <<'END'
http://e.example/ = 0 allow built-in:3
END
	tries -e 'deny address 192.0.2.7' -e 'deny address 192.0.2.8' <<'END'
http://f.example/ = 1 deny -e:2
END
	# The first address chooses the route, and access is judged by those of the
	# server that this leads to.
	tries -e 'deny address 192.0.2.7' -e 'via http://p address 192.0.2.8' <<'END'
http://e.example/ = 0 allow built-in:3 direct
END
	: > names
	tries -e 'to g.example:1 address 192.0.2.7' -e 'deny address 192.0.2.7' <<'END'
http://e.example/ = 0 allow built-in:3 to g.example:1 -e:1
END
	has names '^g'
	run_proxy -e 'deny type text/html' -T http://nowhere.invalid/
	lacks out 'address:'
	# A name that can't be looked up.
	NAME_ADDRESSES=
	tries -e 'deny address 192.0.2.0/24' <<'END'
http://h.example/ = 3 undecided, it needs the server's address -e:1
END
	has out "^	address: the name lookup failed: ."
	tries -e 'direct address 192.0.2.0/24' <<'END'
http://h.example/ = 3 allow built-in:3 undecided, it needs the server's address -e:1
END
}

test_rules_kept_server() { # a kept connection is judged like a new one, and rewritten once
	start_rules <<'END'
deny address 127.0.0.1 method POST
add request X-Add once
deny 450 address 127.0.0.1 url /hidden
END
	plain_origin o
	play -n 'by its address' <<END
	ask    http://a.example:%p/1 = 200
	ask    POST http://a.example:%p/2 Content-Length: 0 = 403
	ask    http://a.example:%p/hidden = 450
	ask    http://a.example:%p/3 = 200
END
	got o <<'END'
= GET /1 HTTP/1.1
= GET /3 HTTP/1.1
!~ ^POST
!~ hidden
END
	play -n 'after a retry' <<'END'
	reply  200 | ok
	origin head ; close
	origin next
	reply  200 | ok
	ask    http://b.example:%p/1
	ask    http://b.example:%p/2
	sees~  ^HTTP/1.1 200
	gets   -- connection 2
	gets   GET /2 HTTP/1.1
	gets#  3 ^X-Add: once$
END
	plain_origin
	want 200 GET http://d.example:%p/
	echo 'deny 451 address 127.0.0.0/8' > rules
	reread 451 http://d.example:%p/
}

test_rules_credentials() { # logins meant for a parent reach no server
	dead_port
	origin s \
	    'want 3 ; send \x05\0 ; want 19 ; send \x05\0\0\x01\x7f\0\0\x01\x12\x34 ; reply 200 | ok'
	s=$origin
	plain_origin h
	h=$origin
	plain_origin o
	start_rules <<END
via http://me:s3cret@$dead direct host last.example
via socks5://$s host abcdef.onion
via http://me:s3cret@$dead http://$h host next.example
via http://$h host relay.example
END
	theirs="Proxy-Authorization: Basic eDp5\n"
	for host in last next relay; do
		want 200 GET http://$host.example:%p/ "$theirs"
	done
	want 200 GET http://abcdef.onion/ "$theirs"
	grep -i '^Proxy-Auth' o.[0-9] s.[0-9] > /dev/null &&
		fail "a server gets a login for a proxy"
	cat h.[0-9] > all
	lacks all "$(basic me:s3cret)"
	counts 2 all '^Proxy-Authorization: Basic eDp5'
}

test_rules_via_body() { # via: a request body goes to the parent that is reached
	dead_port
	start_ruled -e "via http://$dead direct"
	play -n 'by length' <<'END'
	origin head ; skip 500000 ; say 200 | ok
	client send POST http://a.example:%p/ HTTP/1.1\nHost: x\nContent-Length: 500000\n\n
	client fill 500000 ; answer
	sees~  ^HTTP/1.1 200
	log    200 2 .* up=500000 .* end=done
	== a tunnel with early bytes
	origin want 4 ; send pong
	client send CONNECT a.example:%p HTTP/1.1\nHost: x\n\nping ; answer head
	client until pong
	sees   pong
	gets   ping
END
}

test_rules_collapsed() { # who follows another's fetch is judged on its own
	start_ruled -c "$T/cache" \
	    -e 'deny type text/html field request X-Child .' \
	    -e 'unset response X-Mark field request X-Plain .'
	play -n 'three clients of one answer' <<'END'
	origin head ; touch asked ; await go
	origin say 200 Cache-Control: max-age=99\nContent-Type: text/html\nX-Mark: 1 | adults
	origin loop
	first: ask http://a.example:%p/ = 200
	first: sees X-Mark: 1
	first: sees adults
	do comes asked
	child: ask http://a.example:%p/ X-Child: 1 = 403
	child: sees!~ adults
	plain: ask http://a.example:%p/ X-Plain: 1 = 200 | adults
	plain: sees!~ ^X-Mark
	do "$peer" sleep 300
	do touch go
END
}

test_rules_validated() { # what is validated is judged, its old body too
	start_ruled -c "$T/cache"
	origin o <<'END'
reply 200 Cache-Control: max-age=0\nETag: "a"\nContent-Type: text/html | not clean
reply 304 Not\nCache-Control: max-age=0\nETag: "a"
loop
END
	want 200 GET http://o.example:%p/
	start_ruled -c "$T/cache" -e 'deny type text/html url \?type' \
	    -e 'deny type text/html'
	want 403 GET http://o.example:%p/
	start_ruled -c "$T/cache" -e 'deny body "t cle"'
	asks GET http://o.example:%p/
	lacks a 'not clean'
	last_line ' rule=-e:1( |$)'
}

test_rules_odd_names() { # odd names of files, users and reasons split no line
	printf 'a"b c:x\n' > people
	chmod 600 people
	printf 'users people\ndeny "say \\"k\303\266nnte\\" \\\\ x" host b.example\nlogin\n' \
	    > 'my "rules"'
	start_ruled -f 'my "rules"'
	plain_origin
	want 200 GET http://a.example:%p/ \
	    "$(login 'a"b c:x')"
	last_line '^127.0.0.1 - a%22b%20c \[' \
	    ' rule=my%20%22rules%22:3( |$)'
	want 403 GET http://b.example:%p/ '' ' rule=my%20%22rules%22:2( |$)'
	grep "$(printf '^403 Forbidden: say "k\303\266nnte" \\\\ x')" a > /dev/null ||
		fail "the page says $(tail -n 1 a)"
	sed -n 's/^Proxy-Status: //p' a | tr -d '\r' > line
	ascii line
	sed -e 's/\\["\\]//g' -e 's/"[^"\\]*"//g' line |
	    grep '["\\]' > /dev/null &&
		fail "Proxy-Status is no structured field: $(cat line)"
	log_is_sound
}

test_rules_interim() { # an interim answer decides nothing for the answer behind it
	start_rules <<'END'
allow host a.example not type video/*
deny 451 host a.example
deny 450 host b.example not status 200
deny 450 host c.example not type text/html
deny 450 host d.example field response X-Early .
END
	for row in '451 a video/mp4' '200 b x/y' '200 c text/html' '200 d x/y' \
	    '450 c x/y' '200 a text/html'; do
		# shellcheck disable=SC2086 # words
		set -- $row
		play -n "$row" <<END
		reply  103 Early\nX-Early: 1
		origin stall 50 ; say 200 Content-Type: $3 | secret
		ask    http://$2.example:%p/
		log    "GET http://$2.example:%p/ HTTP/1.1" $1 
END
		case $1 in
		200) ;;
		*) grep secret "c$plays" > /dev/null && fail "$row: it passes" ;;
		esac
	done
}

test_rules_address_of_answer() { # what an answer is judged by is the address it came from
	need_second_loopback
	NAME_ADDRESSES='127.0.0.2 127.0.0.1'
	start_ruled -e 'allow address 127.0.0.2' -e 'deny type text/html'
	for at in 127.0.0.1 127.0.0.2; do
		origin "o$at" 'replies 200 Content-Type: text/html | ok' -a $at
		want=403
		[ $at = 127.0.0.1 ] || want=200
		want $want GET http://x.example:%p/
		want $want GET http://x.example:%p/
	done
}

test_rules_evasion() { # other ways to write a host or a URL evade no line
	echo shows.example > shows.list
	rows <<'END'
rule deny 451 host films.example
rule deny 451 list shows.list
rule deny 451 url ^http://[^/]*/secret
rule deny 450 address 127.0.0.2
rule deny 452 type a/evil
rule allow
ask GET http://films.example/ | GET http://films.EXAMPLE/ | GET http://films.example./ = deny 451
ask GET http://films.example..:1/ | GET http://shows.example..:1/ = deny 451
ask CONNECT films.example:1 | CONNECT films.EXAMPLE:1 | CONNECT films.example.:1 = deny 451
ask GET http://shows.example/ | GET http://shows.EXAMPLE/ | GET http://shows.example./ = deny 451
ask CONNECT shows.example:1 | CONNECT shows.EXAMPLE:1 | CONNECT shows.example.:1 = deny 451
ask GET http://films%2eexample/ | GET http://films.example%00/ | GET http://films.example%20/ = 400
ask CONNECT films%2eexample:1 | CONNECT films.example%00:1 | CONNECT films.example%20:1 = 400
ask GET http://shows%2eexample/ | GET http://shows.example%00/ | GET http://shows.example%20/ = 400
ask CONNECT shows%2eexample:1 | CONNECT shows.example%00:1 | CONNECT shows.example%20:1 = 400
ask GET http://x@films.example/ | GET http://x@shows.example/ = 400
ask CONNECT x@films.example:1 | CONNECT x@shows.example:1 = 400
ask GET http://a.example:8080/secret | GET HTTP://A.example:8080/secret = deny 451
ask GET http://a.example.:8080/secret | GET http://a.example:08080/secret = deny 451
ask GET http://127.0.0.2../ | GET http://127.0.0.2./ | CONNECT 127.0.0.2.:1 = deny 450
ask GET http://127.2/ | GET http://0x7f.2/ | GET http://2130706434/ | CONNECT 0177.2:1 = deny 450
ask GET http://[::ffff:127.0.0.2]/ | GET http://[::FFFF:7f00:2]/ = deny 450
ask GET http://192.0.2.1/ > 200 Content-Type: A/Evil ;x=y = deny 452
ask GET http://192.0.2.1/ > 200 Content-Type: a/b\nContent-Type: a/evil = deny 452
ask GET http://192.0.2.1/ > 200 Content-Type: a/b;x=y, a/evil = deny 452
ask GET http://192.0.2.1/ > 200 Content-Type: ,a/evil,a/b = deny 452
ask GET http://192.0.2.1/ > 200 Content-Type: a/b;x=", a/evil" = allow
# A parent would read these hosts in the same way.
rule via http://parent:1
rule deny 450 address 127.0.0.2
ask GET http://127.2/ | GET http://0x7f.2/ | GET http://2130706434/ | CONNECT 0177.2:1 = deny 450
ask GET http://127.3/ | GET http://a127.2/ | GET http://127.2.example/ = allow
# Another server is judged by its own address.
rule to 127.0.0.2:80 host a.example 192.0.2.1
rule deny 450 address 127.0.0.2
rule deny 451 address 192.0.2.0/24
ask GET http://a.example/ | GET http://192.0.2.1/ | CONNECT 192.0.2.1:443 = deny 450
ask GET http://192.0.2.2/ = deny 451
END
	start_ruled -e 'deny host .example' -e 'deny url "^http://x/"' \
	    -e 'deny list shows.list' -e 'deny address 10.0.0.0/8'
	play 'OPTIONS * has no host to judge' <<'END'
	client send OPTIONS * HTTP/1.1\nHost: x\n\n ; answer
	sees   HTTP/1.1 200 OK
END
}

# Processor time for 3000 kept-alive requests, in hundredths of a second, with
# the rules on standard input: rules_cost; sets $cost.
rules_cost() {
	cat > rules
	[ -z "$proxy_pid" ] || stop_proxy
	start_proxy -f rules
	for cost_name in warm cost; do
		cost_before=$(processor_time)
		"$peer" measure -x "${proxy##*:}" "$origin_port" 8 3000 60000 99 > $cost_name
		cost=$(($(processor_time) - cost_before))
	done
	read -r cost_answers _ cost_errors _ < cost
	[ "$cost_answers $cost_errors" = '3000 0' ] || fail "$cost_answers answers"
}

# Rules on standard input must cost less than twice what the rest of a request
# does, which is as dear as they are when the machine is busy.
cheap() {
	sanitized && skip "$special says nothing"
	cat > costly
	load_origin
	for n in 1 2 3 4; do
		rules_cost < /dev/null
		without=$cost
		rules_cost < costly
		[ $((cost - without)) -ge $((without * 2 + 2)) ] || break
	done
	[ $((cost - without)) -lt $((without * 2 + 2)) ] ||
		fail "$(((cost - without) * 10 / 3)) us a request"
	[ "$without" -gt 0 ] || skip "no processor time to see"
}

test_rules_cost_hosts() { # 1000 host lines cost less than two requests without them
	awk 'BEGIN { for (i = 0; i < 1000; i++)
		print "deny host " (i % 2 ? "." : "") "host" i ".example" }' > lines
	cheap < lines
}

test_rules_cost_urls() { # 100 url lines cost less than two requests without them
	awk 'BEGIN { for (i = 0; i < 100; i++)
		print "deny url ^http://[a-z.]*host" i "\\.example/(ads|banner)" }' > lines
	cheap < lines
}

test_rules_direct_judged() { # a parent is gone: going directly, addresses are judged
	need_me
	start_names 127.0.0.1 -- \
	    -e 'via http://127.0.0.1:1 direct' -e "allow client $me"
	play -n 'a name of loopback, by the way behind the parent' <<'END'
	reply  200 | evil
	ask    http://two.test:%p/ = 403 Forbidden
	ask    http://two.test:%p/ = 403 Forbidden
	gets!~ .
END
}

test_rules_parent_nameless() { # a parent whose name has no address: the next one, at once
	origin p 'reply 200 | ok'
	start_proxy -e "via http://nowhere.invalid:1 http://$origin"
	play -n 'the next' <<'END'
	ask    http://dest.invalid/ = 200 | ok
	log    200 2 .* total=N
END
	ms=$(sed -n 's/.* total=\([0-9]*\) .*/\1/p' log)
	[ "$ms" -lt 10000 ] || fail "that took $ms ms"
}

test_rules_parent_skipped() { # a parent that has failed lately is tried after all if the others fail
	dead_port
	first=$dead
	origin b 'reply 200 Connection: close | b'
	start_proxy -e "via http://$first http://$origin"
	asks GET http://dest.invalid/
	has a '^b'
	kill "$(tail -n 1 .pids)"
	"$peer" origin -a 127.0.0.1 -p "${first#*:}" c > c.port <<'END' ||
replies 200 | back
END
		skip "the port is not free any more"
	cut -d ' ' -f 2 c.port >> .pids
	asks GET http://dest.invalid/
	has a '^back'
}

test_rules_denied_no_stale() { # who is denied with 503 gets no stale entry instead
	start_names 127.0.0.1 -- -c "$T/cache" -e 'allow field request X-In .' \
	    -e 'deny 503 "no" address 127.0.0.0/8'
	play -n 'the client would take it stale if there is an error' <<'END'
	reply  200 Connection: close\nAge: 100\nETag: "a"\nCache-Control: max-age=60 | one\l
	ask    http://two.test:%p/ X-In: 1 = 200 | one\l
	ask    http://two.test:%p/ Cache-Control: stale-if-error=999 = 503 Service Unavailable
	sees!~ hit
	sees#  1 ^one
	log    200 4 .* miss=stored
	log    503 .* end=done rule=-e:2 why=
END
}

test_rules_body_empty() { # a body of no bytes is judged before it is sent
	start_cache -e 'deny "empty" not body x'
	play -n 'Content-Length: 0' <<'END'
	reply  200 |
	ask    / = 403 Forbidden
	log    403 .* rule=-e:1
END
}

test_rules_head_too_long() { # the head of a 101 does not fit any more: a page, no tunnel
	start_proxy -e "add response X-More $(printf '%0300d' 0)"
	play '101' <<END
	reply  101 Switching Protocols\nConnection: Upgrade\nUpgrade: x\nX-Long: \{$((room_max - 120)):y}
	origin next
	reply  200 | yes
	ask    / Upgrade: x\nConnection: Upgrade = 502 Bad Gateway
	ask    / = 200 | yes
	log    502 .* why="the answer's head is too long"
	log    200 3
END
}

test_rules_body_long_heads() { # the longest heads are judged with their body too
	start_proxy -e 'deny type text/evil body evil' -e 'unset response X'
	k=$((room_max - 30))
	while [ $k -lt "$room_max" ]; do
		play -n "of $k bytes" <<END
		reply  200 Content-Type: text/evil\nX: \{$((k - 67)):y} | evil
		client send GET http://%O/ HTTP/1.1\nHost: %O\nConnection: close\n\n ; eof
		sees!  evil
		log    why=
END
		k=$((k + 3))
	done
}

test_rules_size_tunnel() { # a tunnel has no size, whatever has passed
	start_proxy -e 'deny size >1'
	play -n 'a server that talks first' <<'END'
	origin send hello, client ; until pong ; send fine ; eof
	ask    CONNECT %O = 200
	client until client ; send pong ; until fine ; shut ; eof
	sees~  fine
	log    end=client
END
}

test_rules_parent_blamed() { # a server that is gone is not the parents' fault
	start_proxy -v -e 'via http://127.0.0.1:1 direct'
	play -n 'the way behind the last parent stays' <<'END'
	reply  200 | ok
	ask    http://127.0.0.1:2/ = 502
	ask    / = 200 | ok
	err#   1 trying 127.0.0.1:1$
END
	quick
	origin s 'want 3 ; send \x05\0 ; want 10 ; stall 3000'
	start_proxy -e "via socks5://$origin direct"
	play -n 'nor that of one who was asked and is silent' <<'END'
	reply  200 | evil
	ask    / = 504
	gets!~ .
END
}

# ---- 11. Rules: conditions as text ------------------------------------------

# Starts a proxy whose log goes where its standard error goes.
merged() {
	exec "$@" >> err 2>> err
}

test_rules_words() { # blanks, quotes, escapes, comments
	{
		printf '\n   \t \n# deny\n  \t# deny "x\n'
		printf 'deny 451 "say \\"no\\" to \\\\ # this"\t host\tone.example'
		printf '  port   1-65535 \t# deny all\n'
		printf 'deny 413 host five.example'
	} > first
	tries -f first <<'END'
http://one.example/ = 1 deny first:5
http://two.example/ = 0 allow built-in:3
http://five.example/ = 1 deny first:6
END
	rows <<'END'
rule deny 451 "say \\"no\\" to \\\\ # this"\t host\tone.example  port   1-65535 \t# deny all
rule \t deny "#a" field request X-A "^#b c\\\\.d$" host two.example
rule deny 410 field request X-A ^a#b$ host two.example # x
rule deny 411 host "port" "not" "three.example"
ask GET http://one.example/ = deny 451
ask GET http://two.example/ = allow at built-in:3
ask GET http://two.example/ X-A: #b c.d = deny 403 at -e:2
ask GET http://two.example/ X-A: #b cxd = allow
ask GET http://two.example/ X-A: a#b = deny 410
ask GET http://port/ | GET http://not/ | GET http://three.example/ = deny 411
ask GET http://six.example/ = allow
END
}

test_rules_quoted_values() { # a quoted value has no meaning of its own
	people
	rows <<'END'
rule users people
rule deny 450 user "*"
rule deny 452 user * host known.example
ask GET http://a/ user alice = allow
ask GET http://known.example/ user alice = deny 452
END
}

# Checks the file "rules".
check_rules() {
	run_proxy -n -f rules
}

test_rules_line_length() { # 8191 bytes pass, 8192 do not
	for n in 8190 8191 8192 8193 20000; do
		awk -v n=$n 'BEGIN {
			s = "deny 451 host long.example #"
			while (length(s) < n)
				s = s "x"
			print "# a"
			print s
		}' > rules
		check_rules
		[ $status = $((n > 8191 ? 2 : 0)) ] ||
			fail "$n bytes: exit status $status"
		[ $n -le 8191 ] || grep '^proxy: rules:2: .' errors > /dev/null ||
			fail "$n bytes: says $(head -c 200 errors)"
		[ "$(wc -l < errors)" = $((n > 8191)) ] ||
			fail "$n bytes: says $(head -c 300 errors)"
	done
	awk 'BEGIN {
		s = "deny 451 host"
		while (length(s) < 8160)
			s = s " host" ++i ".example"
		printf "%s long.example", s
	}' > rules
	tries -f rules <<'END'
http://long.example/ = 1 deny rules:1
http://host99.example/ = 1 deny rules:1
http://short.example/ = 0 allow
END
}

# Lines of rules that are wrong, each in one way.
wrong_lines() {
	each_line <<'END'
frobnicate | allows | "allow" | allow everybody | allow host | allow not
allow client "local" | allow not host | allow host port 80 | allow host x.example port
allow host x.example not | allow not not host x.example | host x.example
host x.example allow | not allow | not host x.example deny | allow client
allow client x | allow client 10.0.0.0/33 | allow client 10.0.0.256
allow client 10.0.0.0/ | allow client 10.0.0.0/8x | allow client 10.0.0.0/-1
allow client 2001:db8::/129 | allow client 2001:db8:::/32 | allow method
allow port | allow port 65536 | allow port x | allow port 80x | allow port 90-80
allow port 80- | allow port -80 | allow port 99999999999999999999 | allow url
allow url ( | allow url [a | allow url a{2,1} | allow url x ( | allow field
allow field X-A | allow field request | allow field request X-A
allow field response X-A ( | allow field "X A" x | allow field X:A x
allow time | allow time Mun | allow time Mon- | allow time Mon,
allow time 25:00-26:00 | allow time 08:60-09:00 | allow time 08:00
allow time 08:00- | allow time 8-17 | allow address | allow address x.example
allow address 127.0.0.0/40 | deny status | deny status x | deny status 500-400
deny type | deny type html | deny type /html | deny size | deny size 100
deny size > | deny size >x | deny size <1T | deny size =1 | deny size >-1
deny body | deny body "" | deny 399 | deny 600 | deny 99 | deny 4000 | deny 403x | deny because
deny 403 because host x.example | deny "a" "b" | deny 403 404 | deny "a" 403
deny "a | deny host "a | deny host "a\" | allow "a" | allow 403 | login "a"
login 407 | drop 403 | drop "a" | via | via host x.example
via http://a%00b:c@127.0.0.1:1 | via socks5://a:b%00@127.0.0.1:1 | via http://a%3Ab:c@127.0.0.1:1
via ftp://127.0.0.1:21 | via nonsense | via http:// | via http://127.0.0.1:0
via socks5://127.0.0.1:65536 | via direct http://127.0.0.1:1
via http://127.0.0.1:1 direct http://127.0.0.1:2 | direct http://127.0.0.1:1
from | from x.example | from 10.0.0.0/8 | from 127.0.0.1 127.0.0.2
from ::1 ::2 | nocache 1h | cache | cache host x.example | cache h | cache 1w
cache -1s | cache x | cache 99999999999999999999d | set | set request
set X-A b | set both X-A b | set request X-A | set request X-A b c
set request X:A b | set request "X A" b | set request "" b | add request X-A
add answer X-A b | unset | unset request | unset X-A | unset request "X A"
unset response X:A | unset request host x.example | users | guard host x.example
guard guard | deny list
END
	printf 'deny body %0256d\n' 0
	for wrong_name in Connection Content-Length Content-Range Expect Host \
	    Keep-Alive Max-Forwards Proxy-Authenticate Proxy-Authorization \
	    Proxy-Connection TE Trailer Transfer-Encoding Upgrade; do
		echo "set request $wrong_name x"
		echo "add response $wrong_name x"
		echo "unset request X-A $wrong_name"
		echo "unset response $wrong_name" | tr '[:upper:]' '[:lower:]'
	done
}

test_rules_wrong() { # all wrong lines are named, with file and line; nothing starts
	wrong_lines > rules
	check_rules
	[ $status = 2 ] || fail "exit status $status"
	[ ! -s out ] || fail "writes to standard output"
	grep -v '^proxy: rules:[1-9][0-9]*: ..*' errors > odd
	[ ! -s odd ] || fail "says $(head -n 1 odd)"
	ascii errors
	sed 's/^proxy: rules:\([0-9]*\):.*/\1/' errors > named
	awk 'FNR == NR { named[$1]++; next }
	named[FNR] != 1 { print FNR ": " $0 " (" named[FNR] + 0 " times)" }' \
	    named rules > missed
	[ ! -s missed ] || fail "$(wc -l < missed) wrong lines are not" \
	    "reported once: $(head -c 1500 missed | tr '\n' '|')"
	for byte in '\001' '\r' '\033' '\0177'; do
		printf 'allow\nset request X-A "a%b"\n' "${byte}b" > rules
		check_rules
		[ $status = 2 ] && grep '^proxy: rules:2: .' errors > /dev/null ||
			fail "the byte $byte: $status, $(cat errors)"
	done
	# Each by its own, too, between right ones and without -n.
	wrong_lines | awk 'NR % 9 == 1' > some
	while IFS= read -r line; do
		printf '# one\nallow\n%s\nallow' "$line" > rules
		exits 2 -l 127.0.0.1:0 -f rules
		{ read -r says && ! read -r more; } < errors &&
			[ "${says#proxy: rules:3: ?}" != "$says" ] ||
			fail "$line: says $(cat errors)"
	done < some
}

# Rules that could never do what was meant, and what must be said of each.
meant_lines() {
	awk -F '\t' '{ n = split($1, part, / [|] /)
	for (i = 1; i <= n; i++)
		print part[i] "\t" $2 }' <<'END'
deny host *example.com	not valid: \*example\.com; write a host .*\.example\.com
deny host ex*mple.com | deny host example.* | deny host *	not valid.*write a host
deny host a.example:8080	without its port
deny host http://a.example/ | deny host a.example,b.example	write a host
deny host a host b	two conditions can't both match.*host a b
deny host a or host b	^or: .*without a word between
deny host a or b	^or: .*quotes
deny host a and port 80	^and: .*without a word between
deny or host a	not valid: or; write a status
deny port 80 and 443	^and: 
deny client 10.0.0.1 client 10.0.0.2	two conditions can't both match.*client a b
deny port 80 host a port 443	two conditions can't both match.*port a b
deny method GET method HEAD	two conditions.*method a b
deny address 10.0.0.0/8 address 172.16.0.0/12	two conditions.*address a b
deny status 404 status 500	two conditions.*status a b
deny type text/html type text/css	two conditions.*type a b
deny method get	not valid: get; write a method in capitals
deny method Post | deny method P* | deny method GET,POST	method in capitals
deny type */html | deny type te*t/html | deny type text/h*l | deny type */* | deny type *	write a type such as
deny type html	write a type such as
deny size >1M <5M	write size >1M size <5M
deny size 10M	not valid: 10M; write a size behind < or >
deny url *.mp4 | deny field X-A *x	can't begin with \*
deny url +x	can't begin with \+
deny field X-* a	one name
deny time 08:00-17:00 Mon-Fri	days stand before their hours, as in Mon-Fri 08:00
deny time 08:00-09:00 10:00-11:00 Sat	days stand before their hours
deny client 10.* | deny address a.example	an address or a network such as
deny port 80,443	a port or a range such as
deny status 5xx	a status or a range such as
deny field Host x | deny field request Host x	Host begins a condition; write it in quotes
deny field X-A time	time begins a condition; write it in quotes
deny host host	host begins a condition; write it in quotes
deny host not	not begins a condition; write it in quotes
deny body type	type begins a condition; write it in quotes
unset request *-For | unset request X-*-For X-A | unset response X-A *-For	a star stands at the end
via http://127.0.0.1:1 status 500 | from 127.0.0.1 status 200	^status: .*too late
via http://127.0.0.1:1 not type text/html	^type: .*too late
direct size >1M	^size: .*too late
direct host a body x | cache 1h body x | nocache not body x | set response X-A b body x	^body: .*too late
direct field response X-A b | unset request X-A field response X-B c	^field: .*too late
set request X-A b status 200	^status: .*too late
delay	^delay: a value is missing; write a duration
delay 5x	^delay: not valid: 5x; write a duration
delay 5s-1s	^delay: not valid: 5s-1s
rate 0	^rate: not valid: 0
rate x	^rate: not valid: x; write bytes a second
limit 0	^limit: not valid: 0; write a number
cut	^cut: a value is missing
answer	^answer: a value is missing; write a status
answer 200	^answer: a value is missing
answer 100 "x"	^answer: not valid: 100
answer 200 text/html	^answer: a value is missing
answer 200 file	^answer: not valid: file
answer 200 "a" "b"	^answer: not valid: b
to	^to: a value is missing; write a server
to example.com	^to: not valid: example.com
delay 1s status 500	^status: what it needs is known too late
cut 1K address 10.0.0.0/8	^address: what it needs is known too late
offline type text/html	^type: what it needs is known too late
offline host a address 10.0.0.0/8	^address: what it needs is known too late
allow page	^page: a value is missing
allow page index	^page: not valid: index; write status or metrics
allow page status host	^host: a value is missing
direct page status	^page: it stands with allow, deny, login or drop
allow type text/html page status	^page: .*not with what needs a server
allow page status page metrics	^page: two conditions
deny chance 101% | deny chance 10	write a share such as 10%
trust client local host a | trust client local time 08:00-17:00 | trust client local user "x"	^trust: only client can stand here
trust client local field A b | trust client local method GET	^trust: only client can stand here
trust client local page status	^(trust: only client can stand here|page: it stands)
trust 10.0.0.5	10.0.0.5
END
}

test_rules_meant() { # what can't do what was meant is refused, with what to write
	meant_lines > meant
	[ "$(wc -l < meant)" -gt 50 ] || fail "no rows"
	sed 's/	.*//' meant > rules
	check_rules
	[ $status = 2 ] || fail "exit status $status"
	sed 's/^proxy: rules:\([0-9]*\): /\1	/' errors > said
	awk -F '\t' 'told { n[$1]++; says[$1] = $2; next }
	n[FNR] != 1 || says[FNR] !~ $2 { print $1 ": says " says[FNR] }' \
	    told=1 said told= meant > missed
	[ ! -s missed ] || fail "$(cat missed)"
	# What looks alike and does what was meant.
	people
	each_line > rules <<'END'
users people | deny user alice not user bob | deny user alice user bob
deny user al* | deny user alice,bob | deny user "al*" "a,b" *
deny not host a not host b host .example.com
deny host .example.com not host www.example.com
deny host [::1] ::1 *.example.com "or" "and" "host" | deny url a url b not url c
deny list l list l | deny field X-A a field X-A b field "Host" "host"
deny size >1 size <5 | deny size >1 >2 | deny time Mon-Fri time 08:00-17:00
deny time 08:00-09:00 10:00-11:00
deny time Sat 09:00-10:00 11:00-12:00 Sun 09:00-10:00
deny method "get" M-SEARCH | deny type text/* text/x-* | unset request X-* X-A
via http://127.0.0.1:1 address 10.0.0.0/8 field X-A b
cache 1h size >5 type text/html status 200
set response X-A b status 200 size >5
END
	echo x.example > l
	check_rules
	sed -n 's/^proxy: rules:\([0-9]*\):.*/\1/p' errors | tr '\n' ' ' > named
	[ "$(cat named)" = '3 4 5 ' ] || fail "says $(cat errors)"
}

test_rules_mark() { # a byte order mark is no part of the first word of rules and users
	printf '\357\273\277alice:wonder\n' > people
	chmod 600 people
	printf '\357\273\277users people\nlogin\n' > rules
	start_proxy -f rules
	plain_origin
	play -n 'a login' <<END
	replies 200 | ok
	ask    / = 407
	ask    / Proxy-Authorization: $(basic alice:wonder) = 200 | ok
END
}

test_rules_wrong_users() { # login and user need users; others may not read them
	wrong 'allow\nlogin\n' 'rules:2: .*users'
	wrong 'deny not user alice\n' 'rules:1: .*users'
	echo alice:wonder > people
	for mode in 644 640 604; do
		chmod $mode people
		wrong 'users people\nlogin\n' 'rules:1: ..*'
	done
	for mode in 600 400; do
		chmod $mode people
		right 'users people\nlogin\n'
	done
	exits 0 -n -e 'users people' -e 'login'
	# All wrong lines are told at once.
	printf '# people\nalice:wonder\nnobody\na:b\nelse\n' > broken
	chmod 600 broken
	wrong 'users broken\nlogin\n' broken:3: broken:5:
	lacks errors wonder
	# Passwords that look hashed, and some that do not.
	cat > broken <<'END'
alice:$1$wonder$KTnRyxV5vxwK7K3tmIJ7H.
alice:$2y$05$wonderc7K3tmIJ7H
alice:$6$wonder$x
alice:$y$j9T$wonder$x
alice:$apr1$wonder$x
alice:{SHA}wonder=
alice:{SSHA}wonder=
bob:$
bob:$$
bob:$5
bob:a$6$b$
bob:$5 and $6
bob:{
bob:{}
bob:{a b}
bob:
END
	check_rules
	[ "$(grep -c '^proxy: broken:[1-7]: .*hashed; write the password' \
	    errors)" = 7 ] && [ "$(wc -l < errors)" = 7 ] ||
		fail "hashed: says $(cat errors)"
	lacks errors wonder
	:
}

# Lines of rules that are right.
right_lines() {
	each_line <<'END'
users people | allow | deny | login | drop | allow user * | allow user alice bob
login not client 10.0.0.0/8
deny 451 "no films at work" host .films.example time Mon-Fri 08:00-17:30
deny list ads.txt | deny list ads.txt ads.txt not client local
deny type application/x-msdownload | deny type video/* audio/mpeg | deny 400
deny 599 | deny "only a reason"
allow client 10.0.0.0/8 2001:db8::/32 192.0.2.7 local ::1
allow method GET HEAD OPTIONS M-SEARCH
allow host a.example .b.example *.c.example 192.0.2.7
allow port 80 443 8000-8999 1-65535
allow url ^http://x\.example/(a|b)*$ [0-9]{2,3}
allow field request User-Agent ^curl/ | allow field response Server .
allow field X-A "a b" | deny time Sat,Sun | deny time 22:00-06:00
deny time Mon-Fri 08:00-12:00 13:00-17:30 Sat 09:00-12:00 | deny time Fri-Mon
deny address 10.0.0.0/8 ::1 fe80::/10 | deny status 404 500-599 | deny size >10M
deny size <1 | deny size >1 | deny size >4G | deny body "This program" virus
via http://127.0.0.1:3128
via http://me:p%40ss@127.0.0.1:3128 socks5://[::1] host .onion
via socks5://127.0.0.1:9050 direct host x.example | direct host .intern.example
from 127.0.0.1 | from 127.0.0.1 ::1 host x.example | nocache host x.example
cache 90s | cache 15m type image/* | cache 1h | cache 7d host x.example
set request User-Agent "Mozilla/5.0 (none)" | set response X-A b host x.example
set request X-A "" | add request X-A b | add response X-A b type text/html
unset request Referer X-Forwarded-* Cookie
unset response Set-Cookie host x.example | guard | trust
trust not client 192.0.2.0/24 | trust client local 10.0.0.5 2001:db8::/32
allow client 192.0.2.1 page status metrics | deny page metrics client 192.0.2.1
END
	printf 'deny body %0255d\n' 0
}

test_rules_right() { # -n: right rules exit 0 in silence; -n -v prints what is in force
	echo ads.example > ads.txt
	echo alice:wonder > people
	chmod 600 people
	right_lines > rules
	check_rules
	[ $status = 0 ] || fail "exit status $status: $(head -n 5 errors)"
	lacks errors '^proxy: rules:'
	[ ! -s out ] || fail "-n alone prints $(head -n 1 out)"
	exits 0 -n -v -f rules -e 'deny host last.example'
	# Each rule with its number; users and guard aside.
	awk '$1 != "users" && $1 != "guard" {
		print "rules:" FNR ": " $1 }' rules > want
	sed -n 's/^\(rules:[0-9]*: [a-z]*\).*/\1/p' out |
	    grep -v -e 'users$' -e 'guard$' | sort -t : -k 2n > have
	cmp -s want have || fail "-n -v: $(diff want have | head -n 4)"
	grep '^rules:[0-9]*: deny .*type' out | sed 's/:.* type/ type/' > have
	sort -t : -k 2n have | cmp -s - have || fail "-n -v: not in order"
	has out '^-e:1: deny .*last.example'
	lacks out 'p%40ss'
	has out '^rules:[0-9]*: via http://.*127.0.0.1:3128.*\.onion'
	has out '^built-in:[0-9]*: allow client local'
	# A port that is taken does not matter.
	start_proxy
	exits 0 -n -l "$proxy"
	for listen in a:b '' proxy:99999 "/$(printf %0200d 0)"; do
		exits 2 -n -l "$listen"
	done
}

test_rules_interrupted() { # reading rules, lists and users goes on after a signal
	have strace || skip "no strace"
	sanitized && skip "$special says nothing"
	strace -D -o strace.try -e inject=read:error=EINTR:when=999 true \
	    2> /dev/null || skip "strace can't inject"
	printf 'u:p\n' > users
	chmod 600 users
	echo ads.example > list
	printf 'users users\ndeny "listed" list %s\n' "$T/list" > rules
	# What the libraries read comes first: each read in turn fails once.
	for n in 1 2 3 4 5 6 7 8; do
		strace -P "$T/rules" -P "$T/users" -P "$T/list" -o calls \
		    -e inject=read:error=EINTR:when=$n "$proxy_bin" -n \
		    -f "$T/rules" > out 2>&1 || fail "read $n: $(cat out)"
	done
	grep EINTR calls > /dev/null || grep -c read calls > /dev/null ||
		fail "nothing was read"
}

# ---- 12. Rules: actions as text, files, trials ------------------------------

test_rules_wrong_options() { # -e is named with its number, several files with theirs
	echo 'deny time x' > one
	printf 'allow\nallow\ndeny port x\n' > two
	exits 2 -n -e 'allow' -f one -e 'alow' -f two -e 'deny "a'
	for where in one:1 two:3 -e:2 -e:3; do
		has errors "^proxy: $where: ."
	done
	counts 4 errors ''
	for line in '' '# deny'; do
		exits 0 -n -e "$line"
	done
	exits 2 -f
}

test_rules_wrong_files() { # missing, binary and unreadable files
	mkdir directory
	for file in none directory; do
		run_proxy -n -f $file
		[ $status != 0 ] && grep "^proxy: .*$file" errors > /dev/null ||
			fail "$file: exit status $status, $(cat errors)"
	done
	wrong 'allow\nallow host a\000b\nallow\n' 'rules:2: .'
	head -c 20000 "$peer" > rules
	check_rules
	[ $status = 2 ] && grep '^proxy: rules:1: .' errors > /dev/null ||
		fail "a program: exit status $status, $(head -n 1 errors)"
	ascii errors
	wrong 'allow\ndeny list none\n' 'rules:2: .*none'
	wrong 'allow\n\nusers none\n' 'rules:3: .*none'
	mkfifo fifo
	wrong 'deny list fifo\n' 'rules:1: fifo: not a file$'
}

test_rules_built_in() { # the built-in lines, around those of the user; guard moves them
	exits 0 -n -v
	awk 'NR == 1 && /^built-in:1: deny ".*" not client local address .*127\.0\.0\.0\/8/ &&
	    /169\.254\.0\.0\/16/ && /fe80::\/10/ && /224\.0\.0\.0\/3/ && /ff00::\/8/ { ok++ }
	NR == 2 && /^built-in:2: deny ".*" not client local method CONNECT not port 443/ { ok++ }
	NR == 3 && /^built-in:3: allow client local/ { ok++ }
	NR == 4 && /^built-in:4: deny ".*"/ { ok++ }
	NR == 5 && /^built-in:5: allow client local page status metrics/ { ok++ }
	NR == 6 && /^built-in:6: deny ".*" page status metrics/ { ok++ }
	END { exit ok != 6 || NR != 6 }' out || fail "prints $(cat out)"
	while IFS='|' read -r rules order; do
		printf '%b' "$rules" > rules
		run_proxy -n -v -f rules
		sed 's/^\([^ ]*\): .*/\1/' out | tr '\n' ' ' > order
		grep -x "$order " order > /dev/null || fail "$rules: $(cat order)"
	done <<'END'
allow host a.example\ndeny host b.example\n|built-in:1 built-in:2 rules:1 rules:2 built-in:3 built-in:4 built-in:5 built-in:6
allow host a.example\nguard\ndeny host b.example\n|rules:1 built-in:1 built-in:2 rules:3 built-in:3 built-in:4 built-in:5 built-in:6
END
}

test_rules_short_options() { # -x, -b and -a are lines behind all others
	printf 'via http://127.0.0.1:1 host a.example\nallow\n' > rules
	exits 0 -n -v -a -b 127.0.0.1 -x http://me:s3cret@127.0.0.1:8080 -f rules
	lacks out s3cret
	for text in 'via .*http://.*127.0.0.1:8080' 'from 127.0.0.1' \
	    'unset request .*Via'; do
		line=$(grep -n -i ": $text" out | sed 's/:.*//' | tail -n 1)
		[ -n "$line" ] || fail "no line $text: $(cat out)"
		mine=$(grep -n '^rules:2: ' out | sed 's/:.*//')
		[ "$line" -gt "$mine" ] || fail "$text is before the rules"
	done
	# No way to write a parent's password shows it.
	for url in 'http://me:se cret@127.0.0.1:1' 'http://me:s3"cret@127.0.0.1:1' \
	    'socks5://me:a b"c cret@127.0.0.1:1'; do
		quoted=$(printf '%s\n' "$url" | sed 's/"/\\"/g')
		run_proxy -n -v -e "via \"$quoted\""
		cat out errors > both
		run_proxy -n -v -x "$url"
		grep cret both out errors > /dev/null &&
			fail "$url: $(cat both out errors)"
	done
	:
}

test_rules_list() { # list: all formats, what lies below, exceptions
	cat > ads <<'END'
# hosts
! a comment
[Adblock Plus 2.0]

0.0.0.0 one.example
127.0.0.1	two.example three.example # both
::1 four.example
five.example
  SIX.example  
*.seven.example
.eight.example
address=/nine.example/
address=/ten.example/0.0.0.0
||eleven.example^
@@||good.eleven.example^
@@||good.five.example^
/banner/*
||part.example/path/*.gif
example.org##.ad
END
	printf 'crlf.example\r\n||crlf2.example^\r\nlast.example' >> ads
	echo other.example > more.list
	{
		echo 'rule deny list ads more.list'
		for host in one two three four five six www.seven www.eight nine \
		    ten eleven www.one a.b.five WWW.Eleven xgood.five crlf crlf2 \
		    last a.last other bad.good1.eleven; do
			echo "ask GET http://$host.example/ = deny 403 at -e:1"
		done
		echo 'ask GET http://one.example./ = deny 403'
		echo 'ask CONNECT www.eleven.example:443 = deny 403'
		for host in good.eleven www.good.eleven good.five xone part \
		    example comment; do
			echo "ask GET http://$host.example/ = allow"
		done
		echo 'ask GET http://example.org/ = allow'
		echo 'rule deny not list more.list'
		echo 'ask GET http://www.other.example/ = allow'
		echo 'ask GET http://one.example/ = deny 403'
	} > list.rows
	rows < list.rows
	plain_origin
	start_ruled -e 'deny list ads more.list'
	has err '^proxy: .*ads.*[0-9]'
	want 403 GET http://a.last.example:%p/
	want 200 GET http://good.five.example:%p/
}

test_rules_list_large() { # list: 200000 domains are read at once, and all hold
	awk 'BEGIN { for (i = 0; i < 200000; i++)
		print "0.0.0.0 host" i * 7 % 200000 ".ads" i % 100 ".example" }' > ads
	before=$("$peer" clock)
	start_proxy -e 'deny list ads'
	sanitized || [ $(($("$peer" clock) - before)) -lt 5000 ] ||
		fail "start took $(($("$peer" clock) - before)) ms"
	has err '^proxy: .*ads.*200000'
	{
		echo 'rule deny list ads'
		sed -n -e 's/.* //' -e '1p;77777p;123456p;$p' ads |
			sed 's|.*|ask GET http://&/ = deny 403|'
		echo 'ask GET http://host1.ads0.example.org/ = allow'
	} | rows
}

test_rules_hup() { # HUP: new rules for new requests, the old ones for those under way
	start_rules <<'END'
deny host a.example
deny type text/html host slow.example
END
	play -n 'one under way, one on a kept connection' <<'END'
	origin head ; touch asked ; await go
	origin say 200 Content-Type: text/html | secret
	origin next
	reply  200 | ok
	origin next
	origin head ; touch asked2 ; await go
	origin say 200 Content-Type: text/plain\nX-A: b | public
	origin next
	replies 200 | ok
	way: ask http://slow.example:%p/ = 403
	way: sees!~ secret
	do comes asked
	kept: ask http://kept.example:%p/ = 200
	kept: ask http://kept2.example:%p/ = 200
	kept: sees Content-Type: text/plain
	kept: ask http://b.example:%p/ = 451
	do comes asked2
	do want 403 GET http://a.example:%p/
	do want 200 GET http://b.example:%p/
	do printf '\ndeny 451 host b.example\ndeny field response X-A b\nunset response Content-Type\n' > rules
	do reread 451 http://b.example:%p/
	do last_line ' rule=rules:2( |$)'
	do want 200 GET http://a.example:%p/
	do touch go
	log    slow.example.* 403 .*rule=rules:2( |$)
END
}

test_rules_hup_wrong() { # HUP: a wrong line keeps the old rules and is named
	plain_origin
	start_rules <<'END'
deny 451 host a.example
END
	printf 'deny host b.example\n\ndeny port x\n' > rules
	kill -HUP "$proxy_pid"
	has err "^proxy: rules:3: ." 5
	want 451 GET http://a.example:%p/
	want 200 GET http://b.example:%p/
	said=$(grep -c '^proxy: .*rules' err)
	mv rules rules.away
	kill -HUP "$proxy_pid"
	wait_for 5 "[ \$(grep -c '^proxy: .*rules' err) -gt $said ]" ||
		fail "a file that is gone is not mentioned: $(cat err)"
	want 451 GET http://a.example:%p/
	mkfifo rules
	kill -HUP "$proxy_pid"
	has err "rules: not a file" 5
	want 451 GET http://a.example:%p/
	rm rules
	echo 'deny 410 host a.example' > rules
	reread 410 http://a.example:%p/
}

test_rules_hup_list() { # HUP: lists are read anew; one that can't be read is a wrong line
	plain_origin
	echo one.example > ads
	start_rules <<'END'
deny list ads
END
	want 403 GET http://one.example:%p/
	echo two.example > ads
	reread 403 http://two.example:%p/
	want 200 GET http://one.example:%p/
	mv ads gone
	echo 'deny 451 host three.example' >> rules
	kill -HUP "$proxy_pid"
	has err "the old rules stay" 5
	has err '^proxy: rules:1: ads: .'
	want 403 GET http://two.example:%p/
	want 200 GET http://three.example:%p/
	mv gone ads
	echo one.example >> ads
	reread 403 http://one.example:%p/
	want 451 GET http://three.example:%p/
}

# A list of so many domains: ads_make N > FILE
ads_make() {
	awk -v n="$1" 'BEGIN { for (i = 0; i < n; i++)
		print "0.0.0.0 host" i ".ads.example" }'
}

test_rules_hup_serves() { # HUP: requests are answered while a large list is read anew
	echo small.example > small
	ads_make 200000 > large
	# Log and standard error go to one file, whose order tells.
	proxy_wrap=merged
	start_ruled -e 'deny list small large'
	proxy_wrap=
	client_bg many 'ask http://host7.ads.example/ ; loop'
	has err "\"GET .* 403 " 10
	kill -HUP "$proxy_pid"
	counts 2 err "^proxy: large: " 30
	stop_proxy
	served=$(awk '/^proxy: small: / { began++ }
		/^proxy: large: / { done++ }
		/"GET .* 403 / && began == 2 && done == 1 { n++ }
		END { print n + 0 }' err)
	[ "$served" -ge 3 ] || fail "$served requests meanwhile"
}

test_rules_hup_twice() { # HUP while a list is read: that reading starts over
	echo small.example > small
	ads_make 200000 > large
	start_ruled -e 'deny list small large'
	kill -HUP "$proxy_pid"
	counts 2 err "^proxy: small: " 10
	ads_make 1000 > next
	mv next large
	kill -HUP "$proxy_pid"
	has err "^proxy: large: 1000 lines" 10
	set -- "/proc/$proxy_pid/fd/"*
	open=$#
	kill -HUP "$proxy_pid"
	counts 2 err "^proxy: large: 1000 lines" 10
	set -- "/proc/$proxy_pid/fd/"*
	[ $# = "$open" ] || fail "a descriptor stays open"
	gives 403 http://host999.ads.example/ || fail "$(head -n 1 a)"
}

test_rules_hup_users() { # HUP: users and passwords are read anew
	people
	plain_origin
	start_rules <<'END'
users people
login
END
	want 200 GET http://%O/ "$(login alice:wonder)"
	printf 'alice:new\ndave:x\n' > people
	reread 200 http://%O/ "$(login alice:new)"
	want 407 GET http://%O/ "$(login alice:wonder)"
	want 407 GET http://%O/ "$(login bob:a:b%41)"
	want 200 GET http://%O/ "$(login dave:x)"
	chmod 644 people
	kill -HUP "$proxy_pid"
	has err "^proxy: rules:1: ." 5
	want 200 GET http://%O/ "$(login dave:x)"
}

test_rules_options() { # -f and -e more than once, with each other
	echo 'deny 451 host a.example' > one
	printf '\nallow host b.example\n' > two
	tries -f one -f two -e 'deny 410 host a.example b.example' \
	    -e 'deny 411 host c.example' <<'END'
http://a.example/ = 1 deny one:1
http://b.example/ = 0 allow two:2
http://c.example/ = 1 deny -e:2
END
}

# Examples by task, as the manual has them.

test_rules_manual() { # RULES in the manual: grammar and examples are right
	need_source
	[ -f "$here/proxy.1" ] || skip "no proxy.1 beside test.sh"
	echo ads.example | tee ads.txt > trackers.txt
	echo alice:wonder > people
	chmod 600 people
	sed -n '/^\.Ss Rules by task/,/^\.Sh/p' "$here/proxy.1" |
		sed 's/\\e/\\/g' |
		awk '/^\.Bd/ { n++; inside = 1; next } /^\.Ed/ { inside = 0 }
		    inside { print > ("example." n) } END { print n }' > count
	[ "$(cat count)" -ge 7 ] || fail "$(cat count) examples"
	for example in example.*; do
		exits 0 -n -f "$example"
	done
	sed -n '/^\.Sh RULES/,/^\.Pp/p' "$here/proxy.1" | sed -n 2p > first
	has first '^The first rule that matches decides'
	sed -n '/^\.Ss Grammar/,/^\.Ed/p' "$here/proxy.1" | sed '1,2d;$d' > grammar
	counts 10 grammar .
	sed -n 's/^	\[[AS][A-Z]*_[A-Z]*\] = { "\([a-z]*\)", [0GF].*/\1/p' \
		"$here/proxy.c" | sort > words
	awk -F '[=|]' '{ for (i = 2; i <= NF; i++)
		print substr($i, 2) }' grammar | sed 's/ .*//' | sort > known
	comm -23 words known > missing
	has words '^allow$'
	has words '^chance$'
	[ ! -s missing ] || fail "not in the grammar: $(cat missing)"
	sed -n "/can't be changed: Connection/,/[.]\$/p" "$here/proxy.1" |
		sed 's/.*: //' | tr -s ', .' '\n' | grep . | sort > fixed
	sed -n '/^static const char fields_of_hop/,/;/p
		/static const char fixed/,/;/p' "$here/proxy.c" |
		tr '"' '\n' | grep '^[A-Z][-A-Za-z0-9]*$' | grep -v LISTED | sort > words
	cmp words fixed > differ || fail "fields that can't be changed: $(cat words)"
}

test_rules_examples() { # each example of the manual does its task
	cat > ads.txt <<'END'
! Title: Ads
||ads.example^
||tracker.example^
@@||shop.tracker.example^
END
	people
	echo tracker.example > trackers.txt
	rows <<'END'
# Block advertisements by a downloaded list.
rule deny list ads.txt
ask GET http://www.ads.example/ | GET http://tracker.example/ = deny 403
ask CONNECT pixel.tracker.example:443 = deny 403
ask GET http://shop.tracker.example/ | GET http://news.example/ = allow
# An office in working hours.
rule deny 451 "not at work" host .films.example time Mon-Fri 08:00-17:30
rule deny 451 "not in the evening" host .games.example time 20:00-23:00
rule deny "not on this day" host .news.example time Sat,Sun
rule deny size >100M time Mon-Fri 08:00-17:30
ask GET http://www.films.example/ time Wed,12:00 | CONNECT www.films.example:443 time Wed,12:00 = deny 451 at -e:1
ask GET http://www.games.example/ time Wed,12:00 = open
ask GET http://www.games.example/ time Wed,12:00 > 200 Content-Length: 2 = allow
ask GET http://www.news.example/ time Wed,12:00 > 200 Content-Length: 2 = allow
ask GET http://work.example/ time Wed,12:00 > 200 Content-Length: 104857601 = deny 403 at -e:4
ask GET http://work.example/ time Wed,18:00 | GET http://www.films.example/ time Wed,18:00 = allow
ask GET http://www.games.example/ time Wed,22:00 = deny 451 at -e:2
ask GET http://www.news.example/ time Sun,12:00 = deny 403 at -e:3
# A build sandbox reaches what it needs, nothing else.
rule allow method GET HEAD host .packages.example packages.example port 80
rule allow method CONNECT host git.example port 443
rule deny "not in the sandbox"
ask GET http://eu.packages.example/x.tar | HEAD http://packages.example/ = allow at -e:1
ask CONNECT git.example:443 = allow at -e:2
# At once, so that no data leaks by look-ups.
ask GET http://evil.example/ | GET http://secret-data.evil.example/ = deny 403 at -e:3
ask POST http://eu.packages.example/ | CONNECT git.example:22 = deny 403 at -e:3
# Only these networks and users from the Internet.
rule users people
rule allow client 192.0.2.7 method GET HEAD
rule allow user alice
rule login not user bob
rule deny
ask GET http://198.51.100.7/ client 192.0.2.7 = allow at -e:2
ask GET http://198.51.100.7/ client 192.0.2.8 | POST http://198.51.100.7/ client 192.0.2.7 = login
ask POST http://198.51.100.7/ client 192.0.2.7 user alice = allow at -e:3
ask GET http://198.51.100.7/ client 192.0.2.8 user carol = allow at -e:4
ask POST http://198.51.100.7/ client 192.0.2.8 user bob = deny 403 at -e:5
# .onion through SOCKS, one site through another parent.
rule via socks5://tor:9050 host .onion
rule via http://me:pw@office:3128 direct host intranet.example
route GET http://onionsite.onion/ | CONNECT onionsite.onion:443 = via socks5://tor:9050 at -e:1
route GET http://intranet.example/ = via http://office:3128 direct at -e:2
route GET http://web.example/ = none
# Refuse programs by name, type and content.
rule deny "no programs" url \.(exe|msi|scr)(\?.*)?$
rule deny "no programs" type application/x-msdownload application/x-dosexec
rule deny "no programs" body "This program cannot be run in DOS mode"
ask GET http://a/a/setup.exe?x = deny 403 at -e:1
ask GET http://a/a = open
ask GET http://a/a > 200 Content-Type: application/x-dosexec\nContent-Length: 2 = deny 403 at -e:2
ask GET http://a/picture.png > 200 Content-Type: image/png\nContent-Length: 100 = open
# Privacy for everybody.
rule unset request Referer From Via Forwarded X-Forwarded-* Cookie
rule set request User-Agent "Mozilla/5.0"
rule unset response Set-Cookie
rule deny list trackers.txt
sends GET http://web.example/ Referer: http://x/\nFrom: a@b\nCookie: id=1\nX-Forwarded-For: 1\nUser-Agent: Special/1\nAccept: */* = Accept: */*\nUser-Agent: Mozilla/5.0
gives GET http://web.example/ > 200 Set-Cookie: id=1\nContent-Length: 2 = Content-Length: 2\nVia: 1.1 p
ask GET http://tracker.example/ = deny 403
END
}

test_rules_reload_memory() { # rules take no more memory the oftener they are read
	have ps || skip "no ps"
	i=0
	while [ $i -lt 1000 ]; do
		echo "deny \"this is reason number $i\" host a$i.example b$i.example c$i.example method GET POST port 80 8080"
		i=$((i + 1))
	done > rules
	start_proxy -f rules
	size=$(ps -o vsz= -p "$proxy_pid") || skip "ps has no vsz"
	for n in 1 2 3; do
		kill -HUP "$proxy_pid"
		"$peer" sleep 500
	done
	served
	more=$(ps -o vsz= -p "$proxy_pid")
	[ $((more - size)) -lt 20000 ] ||
		fail "it had $size KiB and now has $more KiB"
}

# ---- 13. Freshness: what RFC 9111 lets a shared cache do --------------------

# What the cache's pure functions make of heads, times and files.  Rows:
#
#   date DATE = SECONDS           -1 is no date
#   seconds N = SECONDS
#   control [FIELDS] = WORDS      of Cache-Control, or of the field after a colon
#   lifetime:STATUS [FIELDS] = SECONDS [guessed]
#   age:REQUESTED-RESPONDED [FIELDS] = SECONDS
#   reuse:AGE/LIFETIME ASKED > CONTROL = WORD
#   failed:STALE ASKED > CONTROL = yes or no      without an answer
#   answered:STALE ASKED > CONTROL = yes or no    with one
#   storable[:METHOD] [FIELDS] > STATUS [FIELDS] = stored, or why not
#   range:LENGTH RANGE = FIRST LENGTH, whole or none
#   satisfied, met [FIELDS] > [FIELDS] = yes or no
#   variant:VARY [FIELDS] > [FIELDS] = same or other
tables_cache() {
	cat <<'EOF_UNIT'

static struct request query;		/* of a row */
static struct response reply;

/* The query from its first line and fields, at the first guard. */
static void
query_set(const char *line, const char *name, struct text fields)
{
	static char s[4096];

	(void)snprintf(s, sizeof(s), "%s HTTP/1.1\r\nHost: h:8\r\n%s%.*s%s\r\n",
	    line, name, (int)fields.len, fields.at,
	    fields.len > 0 || *name ? "\r\n" : "");
	if (request_parse(string_at_guard(s), &query) != 1)
		unit_fail("no request", line, s, 0);
}

/* The reply from its status and fields, at the second. */
static void
reply_set(const char *status, const char *name, struct text fields)
{
	static char s[4096];

	(void)snprintf(s, sizeof(s), "HTTP/1.1 %.3s X\r\n%s%.*s%s\r\n", status,
	    name, (int)fields.len, fields.at,
	    fields.len > 0 || *name ? "\r\n" : "");
	if (response_parse(at_guard(1, s, strlen(s)), METHOD_GET, &reply) != 1)
		unit_fail("no response", "", s, 0);
}

/* Both, from the fields in front of and behind a ">". */
static void
both_set(struct text in, const char *name)
{
	in = kept(in);
	query_set("GET http://h:8/", name, part_next(&in));
	reply_set("200", name, in);
}

/* A date, at a time that stands before it. */
static void
row_date_at(struct text in)
{
	time_t wall = now.wall;
	char *end;

	in = kept(in);
	now.wall = strtoll(in.at, &end, 10);
	say_row("%lld", (long long)date_parse(text_of(end + 1)));
	now.wall = wall;
}

/* A date cut anywhere is none; changed anywhere it may be. */
static void
row_date(struct text in)
{
	long long date = date_parse(in), got;
	char s[64];
	size_t n;
	int c;

	say_row("%lld", date);
	for (n = 0; n < in.len; n++) {
		if (date_parse(at_guard(1, in.at, n)) != -1 && date != -1)
			say_row(", cut %d", (int)n);
		for (c = 0; c < 256; c++) {
			memcpy(s, in.at, in.len);
			s[n] = (char)c;
			got = date_parse(at_guard(1, s, in.len));
			if (got < -1 || got > 253402300800LL)
				say_row(", changed %d", c);
		}
	}
}

static void
row_seconds(struct text in)
{
	say_row("%lld", (long long)seconds_parse(in));
}

static void
say_limit(const char *word, int64_t n)
{
	if (n != -1)
		say_row("%s=%lld ", word, (long long)n);
}

static void
row_control(struct text in)
{
	struct control c;

	query_set("GET http://h:8/", more[0] ? more : "Cache-Control: ",
	    kept(in));
	c = control_parse(&query.head);
	say_row("%s%s%s%s%s%s%s%s", c.no_store ? "no-store " : "",
	    c.no_cache ? "no-cache " : "", c.is_private ? "private " : "",
	    c.is_public ? "public " : "", c.must_revalidate ? "must " : "",
	    c.proxy_revalidate ? "proxy " : "",
	    c.must_understand ? "understand " : "",
	    c.only_if_cached ? "cached " : "");
	say_limit("max-age", c.max_age);
	say_limit("s-maxage", c.s_maxage);
	say_limit("min-fresh", c.min_fresh);
	say_limit("max-stale", c.max_stale);
	say_limit("revalidate", c.while_revalidate);
	say_limit("error", c.if_error);
	said[said[0] ? strlen(said) - 1 : 0] = '\0';
	say_row(said[0] ? "" : "nothing");
}

static void
row_lifetime(struct text in)
{
	struct control c;
	long long any, told;

	reply_set(more, "", kept(in));
	c = control_parse(&reply.head);
	any = freshness_lifetime(&reply, &c, false).seconds;
	told = freshness_lifetime(&reply, &c, true).seconds;
	say_row("%lld", any);
	if (any != told)
		say_row(told == -1 ? " guessed" : " told %lld", told);
}

static void
row_age(struct text in)
{
	long long requested, responded;

	(void)sscanf(more, "%lld-%lld", &requested, &responded);
	reply_set("200", "", kept(in));
	say_row("%lld", (long long)initial_age(&reply, requested, responded));
}

static void
row_reuse(struct text in)
{
	static const char *const words[] = { [REUSE_FRESH] = "fresh",
		[REUSE_STALE] = "stale", [REUSE_MEANWHILE] = "meanwhile",
		[REUSE_VALIDATED] = "validated" };
	struct control asked, control;
	long long age, lifetime;

	(void)sscanf(more, "%lld/%lld", &age, &lifetime);
	both_set(in, "Cache-Control: ");
	asked = control_parse(&query.head);
	control = control_parse(&reply.head);
	say_row("%s", words[reuse_judge(&asked, &control, age, lifetime)]);
}

/* A server that fails, with an answer or without. */
static void
say_failure(struct text in, bool answered)
{
	struct control asked, control;

	both_set(in, "Cache-Control: ");
	asked = control_parse(&query.head);
	control = control_parse(&reply.head);
	say_row(reuse_on_error(&asked, &control, strtol(more, NULL, 10),
	    answered) ? "yes" : "no");
}

static void
row_failed(struct text in)
{
	say_failure(in, false);
}

static void
row_answered(struct text in)
{
	say_failure(in, true);
}

static void
row_storable(struct text in)
{
	char line[100];
	const char *why;

	in = kept(in);
	(void)snprintf(line, sizeof(line), "%s http://h:8/a",
	    more[0] ? more : "GET");
	query_set(line, "", part_next(&in));
	reply_set(in.at, "", text_from(in, in.len > 4 ? 4 : in.len));
	why = response_obstacle(&query, &reply, -1);
	say_row("%s", why != NULL ? why : "stored");
}

static void
row_range(struct text in)
{
	struct range range = { 0, 0 };
	int got;

	query_set("GET http://h:8/", "Range: ", kept(in));
	reply_set("200", "", text_of(""));
	got = range_parse(&query.head, &reply, strtoull(more, NULL, 10), &range);
	if (got == 1)
		say_row("%llu %llu", (unsigned long long)range.first,
		    (unsigned long long)range.length);
	else
		say_row(got == 0 ? "whole" : "none");
}

static void
row_satisfied(struct text in)
{
	both_set(in, "");
	say_row(request_is_satisfied(&query.head, &reply) ? "yes" : "no");
}

static void
row_met(struct text in)
{
	both_set(in, "");
	say_row(request_is_met(&query.head, &reply) ? "yes" : "no");
}

/* What the request's fields make of a Vary list. */
static void
row_variant(struct text in)
{
	struct buffer *b = buffer_take(), *c = buffer_take();
	struct text vary = at_guard(1, more, strlen(more));

	in = kept(in);
	query_set("GET http://h:8/", "", part_next(&in));
	variant_append(&query, vary, b);
	query_set("GET http://h:8/", "", in);
	variant_append(&query, vary, c);
	say_row(text_equals(buffer_text(b), buffer_text(c)) ? "same" : "other");
	buffer_give(&b);
	buffer_give(&c);
}

/* Each key has a file of its own, in the directory. */
static void
check_paths(void)
{
	static const char *const keys[][2] = { { "", "" }, { "a", "" },
		{ "", "a" }, { "ab", "" }, { "a", "b" }, { "", "ab" },
		{ "b", "a" }, { "http://h:8/", "" }, { "http://h:8/?", "" },
		{ "http://H:8/", "" }, { "http://h:8/a", "" } };
	char paths[COUNT(keys)][CACHE_PATH];
	size_t i, j;

	options.cache = "dir";
	for (i = 0; i < COUNT(keys); i++) {
		entry_path(text_of(keys[i][0]), text_of(keys[i][1]), paths[i]);
		if (strncmp(paths[i], "dir/", 4) != 0 ||
		    strlen(paths[i]) != strlen(paths[0]))
			unit_fail("path", keys[i][0], paths[i], 0);
		for (j = 0; j < i; j++)
			if (strcmp(paths[i], paths[j]) == 0)
				unit_fail("path", keys[i][0], keys[j][0], 0);
	}
}

/* Writes a file of n bytes; what for is said when the result is not want. */
static void
room_put(const char *what, size_t n, bool want)
{
	struct buffer *b = buffer_take();
	bool good;

	memset(b->data + b->end, 'x', n);
	b->end += n;
	good = file_put("./00/entry", b);
	if (good != want)
		unit_fail("room", what, "", good);
	buffer_give(&b);
}

static void
room_is(const char *what, bool good, uint64_t got)
{
	if (!good)
		unit_fail("room", what, "", (long long)got);
}

/* What is assumed at the start; nothing is stored beyond it. */
static void
check_room(void)
{
	char path[CACHE_PATH];

	options.cache = ".";
	options.cache_size = (uint64_t)32 << 12;
	store_assume("", true);
	room_is("in a new directory", store_bytes() + 20000 <= stock->limit &&
	    stock->limit == 30 << 12, stock->limit);
	store_assume("", false);
	room_is("at the start", store_bytes() == 30 << 12 &&
	    stock->limit == 31 << 12, store_bytes());
	room_put("a block with its directory, of one", 100, false);
	room_is("the lack is seen", stock->lack == LACK_SIZE, stock->lack);
	store_assume("", false);
	room_is("a run that did not sweep", store_bytes() == 32 << 12, store_bytes());
	sweep_result(10 << 12);
	room_is("after a sweep", stock->limit == 30 << 12 &&
	    stock->lack == LACK_NONE, stock->limit);
	room_is("unswept goes", access("unswept", F_OK) != 0, 0);
	stock->base = (28 << 12) - stock_sum(stock->grown);
	room_put("one block and its directory", 3000, true);
	room_is("it is counted", store_bytes() >= 30 << 12, store_bytes());
	room_put("one more", 1, false);
	/* A name that another process has taken: the next one will do. */
	stock->base = -stock_sum(stock->grown);
	(void)snprintf(path, sizeof(path), "./tmp.%ld.%llu", (long)getpid(),
	    (unsigned long long)store.serial + 1);
	(void)close(open(path, O_WRONLY | O_CREAT, 0600));
	room_put("a name that is taken", 1, false);
	room_is("the other's file stays", access(path, F_OK) == 0, 0);
	room_put("the next name", 1, true);
}

static void
check_entries(void)
{
	static const int changes[] = { 0, 1, '\n', ' ', '0', '1', '9', 'a', 255,
		256 };
	static char file[65536];
	struct buffer *b = buffer_take();
	struct text head = text_of("HTTP/1.1 200 OK\r\nX-A: b\r\n\r\n");
	struct entry e = { .key = text_of("http://h:8/a b\xff"),
		.variant = text_of("x=1;"), .requested = 1,
		.responded = 1795315380, .age = 7, .body = 12345 }, read;
	size_t n, i, c;

	n = region_build(b, &e, head, 0) ? buffer_len(b) : 0;
	if (n == 0 || n > sizeof(file)) {
		unit_fail("region", "", "", (long long)n);
		return;
	}
	memcpy(file, b->data + b->start, n);
	if (!entry_parse(at_guard(0, file, n), &read) || read.region != n ||
	    read.body != 12345 || !text_equals(read.key, e.key) ||
	    !text_equals(read.variant, e.variant) || read.requested != 1 ||
	    read.responded != 1795315380 || read.age != 7 ||
	    !text_equals(read.head, head) || read.vary.at != NULL)
		unit_fail("entry", "read back", "", (long long)read.body);
	for (i = 0; i < n; i++) {
		if (entry_parse(at_guard(0, file, i), &read))
			unit_fail("entry", "cut", "", (long long)i);
		for (c = 0; c < COUNT(changes); c++) {
			char old = file[i];

			file[i] = changes[c] == 256 ? (char)(old ^ 0x20) :
						      (char)changes[c];
			if (file[i] != old &&
			    entry_parse(at_guard(0, file, n), &read))
				unit_fail("entry", "changed", "", (long long)i);
			file[i] = old;
		}
	}
	/* Built again for its place: just as long, or not at all. */
	b->start = b->end = CHUNK_ROOM;
	if (!region_build(b, &e, head, n) || buffer_len(b) != n)
		unit_fail("region", "rebuilt", "", (long long)n);
	b->start = b->end = CHUNK_ROOM;
	memset(file, 'x', sizeof(file));
	if (region_build(b, &e, text_cut(file, n), n))
		unit_fail("region", "too long", "", (long long)n);
	buffer_give(&b);
}

/* Whether a client that asks for path follows what /a is being stored for,
 * when both have one hash. */
static bool
follows(struct exchange *y, const char *path)
{
	static struct exchange x;
	static struct rules none;
	struct lookup l = { .b = buffer_take(), .fd = -1 };
	struct control asked;
	bool yes;

	memset(&x, 0, sizeof(x));
	x.rules = &none;
	x.request = request_new(&x, RESERVED);
	(void)request_parse(text_of("GET http://a.test/ HTTP/1.1\r\n"
				    "Host: a.test\r\n\r\n"), x.request);
	x.request->target.path = text_of(path);
	x.request->caching.key = y->request->caching.key;
	asked = control_parse(&x.request->head);
	lookup_follow(&x, &asked, &l);
	yes = x.request->caching.follows != NULL;
	buffer_give(&l.b);
	request_drop(&x.request);
	fd_drop(&l.fd);
	return yes;
}

static void
check_collision(void)
{
	static struct exchange y;
	struct response r;
	struct request *q = y.request = request_new(&y, RESERVED);

	options.cache = ".";
	(void)request_parse(text_of("GET http://a.test/a HTTP/1.1\r\n"
				    "Host: a.test\r\n\r\n"), q);
	(void)response_parse(text_of("HTTP/1.1 200 OK\r\nETag: \"a\"\r\n"
				     "Cache-Control: max-age=9\r\n"
				     "Content-Length: 9\r\n\r\n"),
	    METHOD_GET, &r);
	q->times.requested = now.wall;
	if (!fetch_store(&y, &r) || !follows(&y, "/a"))
		unit_fail("not followed", "/a", "", q->caching.fetch != NULL);
	else if (follows(&y, "/b"))
		unit_fail("followed", "/b", "", 1);
}
EOF_UNIT
}

# What rows say often: an old date, and fields with older ones.
dated='Date: Sun, 06 Nov 1994 08:49:37 GMT'
older='Last-Modified: Sun, 06 Nov 1994 08:48:37 GMT'

test_cache_unit_dates() { # three forms of dates, and what is none
	rows <<'END'
date Sun, 06 Nov 1994 08:49:37 GMT | Sunday, 06-Nov-94 08:49:37 GMT | Sun Nov  6 08:49:37 1994 | sun, 06 nov 1994 08:49:37 gmt = 784111777
date Wed Nov 16 08:49:37 1994 = 784975777
date Thu, 01 Jan 1970 00:00:00 GMT = 0
date Mon, 28 Feb 2000 23:59:59 GMT = 951782399
date Tue, 29 Feb 2000 00:00:00 GMT = 951782400
date Wed, 01 Mar 2000 00:00:00 GMT = 951868800
date Fri, 31 Dec 2010 23:59:59 GMT = 1293839999
date Tue, 19 Jan 2038 03:14:08 GMT = 2147483648
date Fri, 31 Dec 9999 23:59:59 GMT = 253402300799
date Friday, 01-Jan-27 00:00:00 GMT = 1798761600
date Wednesday, 01-Jan-70 00:00:00 GMT = 3155760000
date Tuesday, 01-Jan-80 00:00:00 GMT = 315532800
# Exactly 50 years ahead, and a second more.
date Sunday, 22-Nov-76 02:43:00 GMT = 3373238580
date Sunday, 22-Nov-76 02:43:01 GMT = 217478581
# Seen in 2060 and in 1970.
date_at 2840140800 Monday, 05-Jan-05 00:00:00 GMT = 4260556800
date_at 0 Friday, 01-Jan-10 00:00:00 GMT = 1262304000
date | 0 | -1 | now | 784111777 | 1994-11-06T08:49:37Z = -1
date Sun, 06 Nov 1994 08:49:37 | Sun, 06 Nov 1994 08:49:37\s | Sun, 06 Nov 1994 08:49:37 UTC | Sun, 06 Nov 1994 08:49:37 EST | Sun, 06 Nov 1994 08:49:37 +0000 = -1
date Sun, 06 Nov 1994 08:49:37 GMT+1 | Sun, 06 Nov 1994 08:49:37 GMT\s | \sSun, 06 Nov 1994 08:49:37 GMT | "Sun, 06 Nov 1994 08:49:37 GMT" = -1
date Sun, 6 Nov 1994 08:49:37 GMT | Sun,  6 Nov 1994 08:49:37 GMT | Sun,06 Nov 1994 08:49:37 GMT | Sun  06 Nov 1994 08:49:37 GMT | 06 Nov 1994 08:49:37 GMT = -1
date Sun, 06 Nov 94 08:49:37 GMT | Sun, 06 Nov 19940 8:49:37 GMT | Sun, 06 Foo 1994 08:49:37 GMT | Sun, 06 anF 1994 08:49:37 GMT | Sun, 06-Nov-1994 08:49:37 GMT = -1
date Sun, 00 Nov 1994 08:49:37 GMT | Sun, 32 Nov 1994 08:49:37 GMT | Sun, 06 Nov 1994 24:00:00 GMT | Sun, 06 Nov 1994 08:60:37 GMT | Sun, 06 Nov 1994 08:49:61 GMT = -1
date Sun, 06 Nov 1994 8:49:37 GMT | Sun, 06 Nov 1994 08.49.37 GMT | Sun, 06 Nov 1994 -8:49:37 GMT | Sun, 06 Nov 1994 08:49 GMT | Sun, +6 Nov 1994 08:49:37 GMT = -1
date Sunday, 06-Nov-1994 08:49:37 GMT | Sunday, 06-Nov-08:49:37 GMT | Sunday, 06-Nov-x4 08:49:37 GMT | Sunday,x06-Nov-94 08:49:37 GMT = -1
date Sunday, 06 Nov 94 08:49:37 GMT | Sunday, 06-Nov-94 08:49:37 CET | Sun, 06-Nov-94 08:49:37 GMT = -1
date SunxNov  6 08:49:37 1994 | Sun Nov 6 08:49:37 1994 | Sun Nov   08:49:37 1994\s | Sun Nov  6 08:49:37 1994 GMT | Sun Nov  6 08:49:37 94 | Sun, Nov  6 08:49:37 1994 = -1
date Sun, 06 Nov 0094 08:49:37 GMT | Sun, 06 Nov 1994 08:49:3\xb7 GMT = -1
# No such day; a day's name that is none.
date Sun, 31 Feb 1994 08:49:37 GMT | Mon, 29 Feb 1999 08:49:37 GMT | Sun, 31 Apr 1994 08:49:37 GMT = -1
date Xxx, 06 Nov 1994 08:49:37 GMT | Xunday, 06-Nov-94 08:49:37 GMT | Xxx Nov  6 08:49:37 1994 = -1
END
}

test_cache_unit_seconds() { # delta-seconds: digits only, saturating
	rows <<'END'
seconds | 0 | -1 | +1 | 1.5 | \s60 | 60\s | "60 | "6"0" | 0x10 | 6 0 | 1e3 | 60s | 6\xb2 | x | : | / = 0
seconds 1 = 1
seconds 60 = 60
seconds 007 = 7
seconds 2147483646 = 2147483646
seconds 2147483647 = 2147483647
seconds 2147483648 | 4294967297 | 18446744073709551617 | 99999999999999999999999999999999 = 2147483648
END
}

test_cache_unit_controls() { # Cache-Control and Pragma
	rows <<'END'
control:X:\s a = nothing
control | ,, , | xno-store, no-storex, no_store | x="no-store, private" | max-age =5 = nothing
control:X-Cache-Control:\s no-store = nothing
control no-store, no-cache,private ,public = no-store no-cache private public
control MUST-Revalidate = must
control MAX-AGE=9,PRIVATE = private max-age=9
control proxy-revalidate = proxy
control must-understand,only-if-cached = understand cached
control max-age=1, s-maxage=2, min-fresh=3, max-stale=4, stale-while-revalidate=5, stale-if-error=6 = max-age=1 s-maxage=2 min-fresh=3 max-stale=4 revalidate=5 error=6
control max-age=1\nX: y\nCache-Control: s-maxage=2 = max-age=1 s-maxage=2
control max-age=9, max-age=5 | max-age=5\nCache-Control: max-age=9 = max-age=5
control max-age=x | max-age= | max-age=-5 | max-age=+5 | max-age=5x | max-age=0x5 | max-age="5 | max-age=5.0 | max-age= 5 = max-age=0
control max-age=99999999999999999999 = max-age=2147483648
control max-stale = max-stale=2147483647
control x="a\\", no-store", max-age=7 = max-age=7
control private="set-cookie, x", max-age=7 = private max-age=7
control:Pragma:\s no-cache | x, NO-CACHE = no-cache
control:Pragma:\s no-cache\nCache-Control: max-age=1 = max-age=1
END
}

test_cache_unit_lifetimes() { # how long a response is fresh
	rows <<END
lifetime:200 = -1
lifetime:200 Cache-Control: max-age=60 | Cache-Control: s-maxage=60, max-age=0 = 60
lifetime:200 Cache-Control: max-age=60, s-maxage=5 = 5
lifetime:200 Cache-Control: max-age=60, s-maxage=0 | Cache-Control: max-age=0 | Cache-Control: max-age=-9 = 0
lifetime:299 Cache-Control: max-age=9 = 9
lifetime:200 $dated\nExpires: Sun, 06 Nov 1994 08:50:37 GMT = 60
lifetime:200 $dated\nExpires: Sun, 06 Nov 1994 08:49:37 GMT | $dated\nExpires: Sun, 06 Nov 1994 08:48:37 GMT | $dated\nExpires: 0 | $dated\nExpires: = 0
lifetime:200 Expires: Sun, 06 Nov 1994 08:50:37 GMT | $dated\nExpires: 0\n$older = 0
lifetime:200 $dated\nCache-Control: max-age=7\nExpires: 0 = 7
lifetime:200 $dated\n$older = 6 guessed
lifetime:404 $dated\n$older = 6 guessed
lifetime:200 $dated\nLast-Modified: Sun, 06 Nov 1994 07:49:37 GMT = 360 guessed
lifetime:200 $dated\nLast-Modified: Sun, 06 Nov 1983 08:48:37 GMT = 86400 guessed
lifetime:206 $dated\nLast-Modified: Sun, 06 Nov 1994 08:48:37 EST = -1
lifetime:200 $dated\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT | $dated\nLast-Modified: Sun, 06 Nov 1995 08:49:37 GMT | $dated\nLast-Modified: yesterday = -1
lifetime:299 $dated\n$older = -1
lifetime:500 $dated\n$older = -1
lifetime:200 $dated\nSet-Cookie: a=b\n$older = -1
END
}

test_cache_unit_ages() { # how old it was when it came
	rows <<END
age:1000-1000 | Age: -7 | Age: 7.5 | Age: x | Date: nonsense = 0
age:1000-1005 = 5
age:1000-1000 Age: 7 | Age: 7, 9 | Age: 7\nAge: 9 = 7
age:1000-1005 Age: 7 = 12
age:1000-1000 Age: 99999999999999999999 = 2147483648
age:784111777-784111777 $dated = 0
age:784111777-784111780 $dated = 3
age:784111877-784111877 $dated = 100
age:784111700-784111700 $dated = 0
age:784111877-784111877 $dated\nAge: 300 = 300
age:784111877-784111877 $dated\nAge: 3 = 100
END
}

test_cache_unit_reuse() { # fresh, stale, meanwhile, to be validated; on errors
	rows <<'END'
reuse:0/60 > | max-age=1 > = fresh
reuse:59/60 > | > must-revalidate | > stale-while-revalidate=9 = fresh
reuse:60/60 > = validated
reuse:61/60 > = validated
reuse:0/0 > | max-age=0, max-stale > | max-age=0 > stale-while-revalidate=9 = validated
reuse:0/-1 > = validated
reuse:0/60 > no-cache | no-cache > | max-age=0 > | max-age=0, min-fresh=0 > | min-fresh=99 > = validated
reuse:99/60 no-cache, max-stale > = validated
reuse:29/60 max-age=30 > = fresh
reuse:31/60 max-age=30 > | max-age=30, max-stale > = validated
reuse:1/60 max-age=1 > = fresh
reuse:1/60 max-age=0 > | max-stale > no-cache = validated
reuse:61/60 max-age=99 > | max-stale=0 > | max-stale=x > | max-stale > must-revalidate | max-stale > proxy-revalidate | max-stale > s-maxage=60 = validated
reuse:70/60 max-age=90, max-stale > | max-stale=10 > = stale
reuse:71/60 max-stale=10 > = validated
reuse:99999/60 max-stale > = stale
reuse:45/60 min-fresh=10 > | min-fresh=15 > | max-age=50, min-fresh=10 > = fresh
reuse:55/60 min-fresh=10 > | max-age=50 > = validated
reuse:65/60 > stale-while-revalidate=9 = meanwhile
reuse:70/60 > stale-while-revalidate=9 = validated
reuse:65/60 > stale-while-revalidate=9, must-revalidate | no-cache > stale-while-revalidate=9 | max-age=60 > stale-while-revalidate=9 | min-fresh=1 > stale-while-revalidate=9 | > stale-if-error=99 = validated
failed:10 > = yes
failed:11 > stale-if-error=10 = no
failed:1 > must-revalidate | > proxy-revalidate | > s-maxage=9 | > no-cache | no-cache > = no
answered:10 > = no
answered:10 > stale-if-error=10 = yes
answered:11 > stale-if-error=10 = no
answered:11 stale-if-error=20 > = yes
answered:1 > must-revalidate, stale-if-error=9 = no
END
}

test_cache_unit_storable() { # what may be stored
	c='Cache-Control:' cookie='Set-Cookie: a=b' login='Authorization: x'
	rows <<END
storable > 200 $c max-age=9 | > 200 $older | > 200 ETag: "a" | > 200 $c max-age=0\nETag: "a" | > 200 $c no-cache\nETag: "a" = stored
storable > 200 | > 200 $dated\nExpires: 0 | > 200 $c max-age=0 = no-lifetime
storable > 200 $c no-store, max-age=9 | $c no-store > 200 $c max-age=9 = no-store
storable > 200 $c private, max-age=9 | > 200 $c private="x", max-age=9 | $login > 200 $c public, private, max-age=9 = private
storable > 200 $c no-store, must-understand, max-age=9 | > 299 $c max-age=9 | > 299 $c public\n$older = stored
storable > 299 $c must-understand, max-age=9 | > 299 $older | > 500 $older | > 302 $older | > 304 $c max-age=9 | > 429 $c max-age=9 = status
storable > 404 $older | > 410 $older | > 301 $older | > 302 $c max-age=9 | > 503 $c max-age=9 = stored
storable > 200 $c max-age=9\nVary: * | > 200 $c max-age=9\nVary: a, * ,b | > 200 $c max-age=9\nVary: a\nVary: b, * = vary-*
storable > 200 $c max-age=9\nVary: a = stored
storable > 200 $older\n$cookie | > 200 $c public\n$older\n$cookie | > 200 $c max-age=0, s-maxage=0\n$older\n$cookie = set-cookie
storable > 200 $c max-age=9\n$cookie | > 200 $c public, max-age=9\n$cookie | > 200 $c s-maxage=9\n$cookie = stored
storable $c no-cache > 200 $c max-age=9 = stored
storable $login > 200 $c max-age=9 | $login > 200 $older = authorization
storable $login > 200 $c public, max-age=9 | $login > 200 $c s-maxage=9 | $login > 200 $c must-revalidate, max-age=9 = stored
storable > 206 $c max-age=9\nContent-Range: bytes 0-1/9 = range
storable:HEAD > 200 $c max-age=9 = stored
storable:POST > 200 $c max-age=9 = method
storable:PUT > 200 $c max-age=9 = method
storable:DELETE > 200 $c max-age=9 = method
storable:FOO > 200 $c max-age=9 = method
storable:get > 200 $c max-age=9 = method
END
}

test_cache_unit_ranges() { # the one range, none, or not to be satisfied
	rows <<'END'
range:10 bytes=0-0 = 0 1
range:10 bytes=2-4 = 2 3
range:10 bytes=9-9 | bytes=-1 = 9 1
range:10 bytes=0-9 | bytes=0-10 | bytes=-10 | bytes=-11 = 0 10
range:10 bytes=5- | bytes=5-9223372036854775807 = 5 5
range:10 bytes=007-8 = 7 2
range:5000000000 bytes=3000000000- = 3000000000 2000000000
range:10 bytes=10- | bytes=10-20 | bytes=-0 = none
range:0 bytes=-0 | bytes=0-0 | bytes=1- = none
range:0 bytes=0- | bytes=-5 = whole
range:10 bytes=4-2 | bytes= | bytes=- | bytes=--1 | bytes=1--1 | bytes=1 | bytes=a-b | bytes=+1-2 | bytes=1-2x | bytes=1 -2 | bytes=0x1-2 | bytes 1-2 = whole
range:10 lines=1-2 | 1-2 | bytes=0-1,3-4 | | bytes=1-99999999999999999999 | bytes=99999999999999999999- | bytes=-99999999999999999999 = whole
END
}

test_cache_unit_conditions() { # the conditions of clients
	since='If-Modified-Since: Sun, 06 Nov 1994 08:48'
	until='If-Unmodified-Since: Sun, 06 Nov 1994 08:48'
	rows <<END
satisfied If-None-Match: "a" > ETag: "a" | If-None-Match: W/"a" > ETag: "a" | If-None-Match: "a" > ETag: W/"a" | If-None-Match: "b", "a" > ETag: "a" | If-None-Match: "x,\\" > ETag: "x,\\" | If-None-Match: * > = yes
satisfied > ETag: "a" | If-None-Match: "b" > ETag: "a" | If-None-Match: "A" > ETag: "a" | If-None-Match: a > ETag: "a" | If-None-Match: "a" > | If-None-Match: > ETag: "a" = no
satisfied $since:37 GMT > $older | $since:38 GMT > $older | If-None-Match: "a"\n$since:36 GMT > ETag: "a"\n$older = yes
satisfied $since:36 GMT > $older | $since:38 CET > $older | If-Modified-Since: 0 > $older | If-None-Match: "b"\n$since:38 GMT > ETag: "a"\n$older = no
met > ETag: "a" | If-Match: "a" > ETag: "a" | If-Match: "b", "a" > ETag: "a" | If-Match: * > = yes
met If-Match: W/"a" > ETag: W/"a" | If-Match: "a" > ETag: W/"a" | If-Match: "a" > | If-Match: > = no
met $until:37 GMT > $older | $until:36 GMT > | $until:36 CET > $older | If-Match: "a"\n$until:36 GMT > ETag: "a"\n$older = yes
met $until:36 GMT > $older = no
END
}

# ---- 14. Store: entries in a directory --------------------------------------

test_cache_readable() { # an entry can be read with head and grep
	start_cache
	play 'an entry with Vary' <<'END'
	reply  203 Odd\nX-Mark: yes\nVary: X-A\nCache-Control: max-age=99\nAge: 7 | one\l
	ask    /some/path?q X-A: kiwi
	sees   one\l
END
	grep -r -l '^X-Mark: yes' cache > found
	[ "$(wc -l < found)" -eq 1 ] || fail "found: $(cat found)"
	e=$(cat found)
	tr -d '\r' < "$e" > text
	for line in "http://$origin/some/path?q" 'HTTP/1.1 203 Odd' kiwi \
	    'Cache-Control: max-age=99' one; do
		grep -F -e "$line" text > /dev/null || fail "no $line in $e"
	done
	responded=$(sed -n 's/^responded: //p' text)
	wall=$(date +%s)
	[ "$responded" -ge $((wall - 60)) ] && [ "$responded" -le $((wall + 1)) ] ||
		fail "responded: $responded, now $wall"
	case $(ls -l "$e") in
	-rw-------*) ;;
	*) fail "$(ls -l "$e")" ;;
	esac
	[ "$(tail -c 4 "$e")" = one ] || fail "the body is not its end"
}

# Starts an origin "o" whose answer is fresh, with a body of BYTES bytes of the
# pattern (10000 unless told), one connection a request.
fresh_origin() {
	origin o <<END
reply 200 Connection: close\nCache-Control: max-age=999\nX-Mark: yes\nContent-Length: ${1-10000}
fill ${1-10000}
END
}

# Gets /x from that origin, in whole and right: get_fresh [BYTES [PATH]]
get_fresh() {
	client g <<END
send GET http://%O${2-/x} HTTP/1.1\nHost: %O\nConnection: close\n\n
until \n\n ; skip ${1-10000} ; eof
END
	came_to g eof
	IFS= read -r get_line < g
	case $get_line in
	'HTTP/1.1 200'*) ;;
	*) fail "${what-}: $get_line" ;;
	esac
}

# The one entry.
entry() {
	entry_file=
	wait_for 5 'entry_file=$(entries); [ -f "$entry_file" ]' ||
		fail "${what-}: no entry, or several: $entry_file"
}

# Cuts a file to its first BYTES, in its place: cut_to BYTES FILE
cut_to() {
	head -c "$1" "$2" > cut~ && cat cut~ > "$2"
}

test_cache_odd_files() { # a directory, a link to itself, a pipe: a miss
	start_cache
	fresh_origin
	get_fresh
	entry
	e=$entry_file
	n=1
	for what in directory loop pipe; do
		rm -r "$e"
		case $what in
		directory) mkdir -p "$e/x" ;;
		loop) ln -s "$e" "$e" ;;
		pipe) mkfifo "$e" ;;
		esac
		get_fresh
		n=$((n + 1))
		asked $n
		served
	done
	nothing_left
}

test_cache_deleted() { # an entry or the whole directory may go at any time
	start_cache
	fresh_origin
	get_fresh
	entry
	rm "$entry_file"
	get_fresh
	asked 2
	rm -r cache/[0-9a-f]*
	get_fresh
	asked 3
	get_fresh
	asked 3
	rm -r cache
	get_fresh
	get_fresh
	served
}

test_cache_slow_reader() { # an entry deleted, replaced or cut under a reader
	start_cache
	fresh_origin 8000000
	get_fresh 8000000
	for n in 1 2 3; do
		client_bg slow$n <<END
send GET http://%O/x HTTP/1.1\nHost: %O\nConnection: close\n\n
until \n\n ; touch began$n ; await go$n ; skip 8000000 ; eof
END
	done
	comes began1 began2 began3
	entry
	mv "$entry_file" moved
	touch go1
	what=deleted
	ends slow1 '^eof$'
	get_fresh 8000000
	touch go2
	what=replaced
	ends slow2 '^eof$'
	cut_to 6000 moved
	touch go3
	what='cut short'
	ends slow3 '^(eof|reset) skip'
	served
}

test_cache_killed() { # kill -9 while an entry is stored: none is there
	start_cache
	play -n 'half of it' <<'END'
	reply  200 Connection: close\nCache-Control: max-age=999\nContent-Length: 1000000
	origin fill 500000 ; await over
	origin next
	reply  200 Connection: close\nCache-Control: max-age=999\nContent-Length: 1000000
	origin fill 1000000
	a: send GET http://%O/x HTTP/1.1\nHost: %O\n\n ; until \n\n
	a: skip 500000 ; touch half ; await over
	do comes half
	do wait_for 10 '[ -n "$(find cache -name "tmp*" -size +100)" ]' || fail "nothing is being stored"
	do kill -9 "$proxy_pid"
	do wait "$proxy_pid"; : > .proxies
	do touch over
END
	start_cache
	[ -z "$(entries)" ] || fail "there is $(entries)"
	get_fresh 1000000
	logged <<'END'
~ miss=stored
END
}

# Gets BYTES of /x twice, for which the origin was asked N times by then; then
# nothing is stored if it says so: get_twice BYTES N [none]
get_twice() {
	get_fresh "$1"
	get_fresh "$1"
	asked "$2"
	[ -z "${3-}" ] || nothing_stored
}

test_cache_full() { # a full disk costs the entry, never the answer
	cat > limited <<'END'
ulimit -f 64
trap '' XFSZ
exec "$@"
END
	proxy_wrap="sh limited"
	start_cache
	what='more than fits'
	fresh_origin 200000
	get_twice 200000 2 none
	logged <<'END'
~ 200 200000 .* end=done
~ 200 200000 .* end=done
!~ hit=
END
	what='what fits'
	fresh_origin 9000
	get_twice 9000 1
	served
}

test_cache_unwritable_start() { # a directory that can't be written is named at the start
	as=
	if [ "$(id -u)" = 0 ]; then
		have setpriv || skip "root may write everywhere, and no setpriv"
		chmod 711 "$work" "$T"
		as='setpriv --reuid=65534 --clear-groups'
	fi
	mkdir full
	chmod 555 full
	# shellcheck disable=SC2086 # words of a command
	$as "$proxy_bin" -c "$T/full" -- true 2> errors
	has errors "^proxy: can't write the cache .*/full: "
}

test_cache_read_only() { # a directory that can't be written costs the entry only
	if [ "$(id -u)" = 0 ]; then
		# Root may write everywhere, nobody may not.
		chmod 711 "$work" "$T"
		mkdir cache
		chown 65534:65534 cache
		start_cache -u 65534
	else
		start_cache
	fi
	fresh_origin
	get_fresh
	what='a new one'
	chmod -R a-w cache
	get_fresh 10000 /y
	get_fresh
	chmod -R u+w cache
	asked 2
	logged <<'END'
~ miss=stored
~ /y 
~ hit=fresh
END
}

test_cache_shared() { # two proxies on one directory share what they store
	start_cache
	one=$proxy
	name=two start_cache
	two=$proxy
	fresh_origin
	get_fresh
	proxy=$one
	get_fresh
	asked 1
	logged <<'END'
~ hit=fresh
END
	origin many \
	    'reply 200 Cache-Control: max-age=999\nContent-Length: 20000 ; fill 20000 ; loop'
	# Both store the same at once.
	for n in 1 2 3 4; do
		[ $((n % 2)) = 0 ] && at=$one || at=$two
		client_bg m$n "$at" <<END
await start ; send GET http://%O/m HTTP/1.1\nHost: %O\nConnection: close\n\n
until \n\n ; skip 20000 ; eof
END
	done
	touch start
	ends m1 m2 m3 m4 '^eof$'
	nothing_left
	served
}

# The files of the entries /FROM to /TO, with their numbers: entries_of FROM TO
entries_of() {
	find cache -type f ! -name 'tmp*' -exec \
	    grep -x "key: http://$origin/[0-9]*" /dev/null {} + 2> /dev/null |
	    awk -F / -v from="$1" -v to="$2" '
		{ n = $NF; sub(/:.*/, "") }
		n >= from && n <= to { print $0, n }'
}

test_cache_unwritable() { # a directory that can't be written is said once
	start_cache
	rm -r cache
	play 'not stored' <<'END'
	replies 200 Cache-Control: max-age=9 | ok
	ask    / = 200; fwd=uri-miss
	ask    / = 200; fwd=uri-miss
	log    miss=no-room
END
	counts 1 err "^proxy: can't write the cache $T/cache: No such file or directory"
}

test_cache_unit_variants() { # variants and names of entries; every byte of an entry's region changed, or cut; what is stored while little is known; two URLs with one hash
	unit paths entries room collision <<'END'
variant:a > | b: 1 > b: 2 | a: 1 > A: 1 | a: x, y > a: x,y | a: x,y > a: x\na: \ty\s = same
variant:user-agent user-agent: x, y > user-agent: x,y = other
variant:a a: 1 > a: 2 | a: 1 > | a: x,y > a: y,x | a: X > a: x | a: "x,y" > a: "x, y" = other
variant:a,\sb a: 1\nb: 2 > b: 2\nc: 3\na: 1 = same
variant:a,\sb a: 1\nb: 2 > a: 2\nb: 1 | a: 1 > b: 1 | a: 1;b=2 > a: 1\nb: 2 | a: 1;b=2;b= > a: 1\nb: 2;b= | a: 1;b=2 > a: 1\nb: 2;b= = other
END
}

# ---- 15. Store: the sweeper -------------------------------------------------

# The proxy does not start with this as its cache, and says so in a line.
refuses_cache() {
	run_proxy -c "$1" -l 127.0.0.1:0
	[ "$status" = 1 ] && [ "$(wc -l < errors)" -eq 1 ] ||
		fail "$1: status $status: $(cat errors)"
}

test_cache_directory() { # mode 700, CACHEDIR.TAG; foreign files are refused
	(umask 022 && mkdir parent)
	umask 000
	start_proxy -c "$T/parent/cache"
	case $(ls -ld parent/cache) in
	drwx------*) ;;
	*) fail "$(ls -ld parent/cache)" ;;
	esac
	head -n 1 parent/cache/CACHEDIR.TAG |
		grep '^Signature: 8a477f597d28d172789f06886806bc55$' \
		    > /dev/null || fail "no CACHEDIR.TAG"
	stop_proxy
	for foreign in notes.txt me tmp.x .profile; do
		mkdir foreign
		echo mine > "foreign/$foreign"
		refuses_cache foreign
		has errors '^proxy: .*foreign'
		grep mine "foreign/$foreign" > /dev/null || fail "$foreign is gone"
		[ ! -f foreign/CACHEDIR.TAG ] || fail "$foreign: CACHEDIR.TAG is made"
		rm -r foreign
	done
	# A link would have the sweeper remove what is not the cache's.
	mkdir foreign
	"$proxy_bin" -c foreign -k http://x/ 2> /dev/null
	start_proxy -c "$T/foreign"
	stop_proxy
	ln -s "$T/parent" foreign/ab
	refuses_cache foreign
	: > file
	refuses_cache file
	refuses_cache none/cache
	for size in '' 0 x -1 1Q 99999999999999999999; do
		exits 2 -c sized -s "$size" -l 127.0.0.1:0
	done
}

test_cache_damaged() { # a damaged entry is a miss, or visibly short; never wrong
	start_cache
	fresh_origin
	get_fresh
	n=1
	for what in first-line number key time head mark-removed cut-1 cut-70 \
	    cut-300 cut-4095 empty foreign zeros swapped text-added; do
		entry
		case $what in
		first-line) sed '1s/proxy-cache 1/proxy-cache 2/' ;;
		number) sed '1s/body 0*10000/body 00000000000000009999/' ;;
		key) sed 's|^key: http|key: httq|' ;;
		time) sed 's|^responded: 1|responded: 2|' ;;
		head) sed 's/X-Mark: yes/X-Mark: yez/' ;;
		mark-removed) sed '/X-Mark: yes/d' ;;
		cut-*) head -c "${what#cut-}" ;;
		empty) : ;;
		foreign) cat > /dev/null; echo 'something else' ;;
		zeros) cat > /dev/null; head -c 20000 /dev/zero ;;
		swapped) sed 's|^HTTP/1.1 200 OK|HTTP/1.1 201 OK|' ;;
		text-added) sed 's/^pad: /pad: xx/' ;;
		esac < "$entry_file" > damaged
		cmp damaged "$entry_file" > /dev/null && fail "$what: no damage"
		cat damaged > "$entry_file"
		get_fresh
		n=$((n + 1))
		asked $n
		get_fresh
		asked $n
	done
	served
}

test_cache_damaged_body() { # an entry whose body is cut: short once at most
	start_cache
	fresh_origin
	get_fresh
	entry
	region=$(head -n 1 "$entry_file" | sed 's/.* region 0*\([0-9]*\) .*/\1/')
	for left in 0 1 5000 9999; do
		entry
		cut_to $((region + left)) "$entry_file"
		rm -f s s.end
		client s <<'END'
send GET http://%O/x HTTP/1.1\nHost: %O\n\n
until \n\n ; skip 10000 ; stall 20
END
		# Whole from the origin, or the connection ends in the middle.
		ends s '^(open|eof skip 10000|reset skip 10000)$'
		what="after $left bytes were left"
		get_fresh
		get_fresh
	done
	what='a body too long'
	entry
	echo more >> "$entry_file"
	get_fresh
	served
}

test_cache_restart() { # entries survive, temporary files of a crash do not
	start_cache
	fresh_origin
	get_fresh
	stop_proxy
	: > cache/tmp.999999999.1
	start_cache
	[ ! -e cache/tmp.999999999.1 ] || fail "the temporary file is still there"
	get_fresh
	asked 1
	logged <<'END'
~ miss=stored
~ hit=fresh
END
	# What a user empties while it is in use is still a cache.
	rm -r cache/*
	get_fresh
	asked 2
	stop_proxy
	start_cache
	get_fresh
	asked 2
}

# Gets /FROM to /TO from the origin at hand on one connection:
# get_many FROM TO
get_many() {
	awk -v from="$1" -v to="$2" 'BEGIN {
		for (n = from; n <= to; n++)
			printf "ask /%d X-A: 1\n", n
	}' > many.steps
	client many < many.steps
	came_to many open
}

# An origin whose answers are fresh, so many bytes, each its own entry:
# many_origin BYTES ['response fields\n']
many_origin() {
	origin o "replies 200 Cache-Control: max-age=9999\n${2-} | \{$1:x}"
}

# KiB of the disk that all files of the cache take.
disk_use() {
	find cache -type f -exec du -k {} + 2> /dev/null |
		awk '{ sum += $1 } END { print sum + 0 }'
}

# Sets the files' times to HOURS[:MINUTES] ago: aged HOURS FILE...
aged() {
	aged_when=$(TZ="AGO$1" date +%Y%m%d%H%M.%S)
	shift
	TZ=UTC0 touch -t "$aged_when" "$@"
}

# True if a file's time is less than HOURS[:MINUTES] ago: younger HOURS FILE
younger() {
	: > younger.ref
	aged "$1" younger.ref
	[ -n "$(find "$2" -newer younger.ref)" ]
}

# How many of them are there: there FROM TO
there() {
	entries_of "$1" "$2" | awk '!seen[$2]++ { n++ } END { print n + 0 }'
}

# Sets their times to HOURS ago: all_aged HOURS FROM TO
all_aged() {
	# shellcheck disable=SC2046 # several
	aged "$1" $(entries_of "$2" "$3" | sed 's/ .*//')
}

# Old ones went, and what is younger (9 to 24) not before all of them.
swept_in_order() {
	[ "$(there 1 8)" -lt 8 ] &&
		{ [ "$(there 9 24)" = 16 ] || [ "$(there 1 8)" = 0 ]; }
}

test_cache_sweep() { # what was used least recently goes, and nothing without need
	start_cache -s 1M
	many_origin 20000
	# 25 times 24 KiB are less than five eighths of 1 MiB: all stay.
	get_many 1 25
	wait_for 5 '[ "$(there 1 25)" = 25 ]' || [ "$(disk_use)" -gt 604 ] ||
		fail "of 25 there are $(there 1 25)"
	[ "$(disk_use)" = 604 ] || skip "files take $(disk_use) KiB here"
	all_aged 20 1 8
	all_aged 2 9 24
	# This one is as old as any, but then it is used.
	all_aged 20 25 25
	get_many 25 25
	younger 1 "$(entries_of 25 25 | sed 's/ .*//')" || fail "a hit does not show in its time"
	# 21 more would make 1108 KiB; they and the one used are 528. In one go
	# they might come faster than a busy machine sweeps, and not be stored.
	n=26
	while [ $n -le 46 ]; do
		get_many $n $((n + 2))
		"$peer" sleep 100
		n=$((n + 3))
	done
	wait_for 10 swept_in_order ||
		fail "oldest $(there 1 8) of 8, old $(there 9 24) of 16"
	wait_for 5 '[ "$(there 25 46)" = 22 ]' || fail "of the young there are" \
		"$(there 25 46), not 22"
	get_many 25 46
	counts 23 log hit=fresh
}

# KiB of the disk that the directory takes with all that is in it.
disk_use_all() {
	du -s -k cache 2> /dev/null | awk '{ print $1 }'
}

# The cache of 1 MiB never takes more while a command fills it many times over:
# overfilled WHAT COMMAND...
overfilled() {
	what=$1
	shift
	rm -f filled
	(
		trap ': > filled' EXIT
		"$@"
	) &
	overfilled_most=$("$peer" most cache filled)
	wait $! || fail "$(cat "$T/.fail")"
	[ "$overfilled_most" -le 1024 ] ||
		fail "$what: $overfilled_most KiB of 1024"
	echo "$what: at most $overfilled_most KiB"
	[ "$overfilled_most" -gt 300 ] || fail "$what: only $overfilled_most KiB"
}

# Fills the cache of 1 MiB many times over while it is looked at:
# overfill WHAT BYTES COUNT ['response fields\n']
overfill() {
	many_origin "$2" "${4-}"
	overfilled "$1" get_many 1 "$3"
}

test_cache_sweep_size() { # the directory is never larger than -s
	start_cache -s 1M
	overfill 'middling objects' 20000 90
	overfill 'large objects' 250000 12
	overfill 'small objects' 10 400
	overfill 'small objects with Vary' 10 200 'Vary: X-A\n'
	served
}

test_cache_sweep_hangs() { # a sweeper that hangs is killed, and another one makes room
	our_names
	export SWEEP_MS=1000
	start_cache -s 1M
	# Not before: the proxy's own first walk would wait, too.
	: > walk-halted
	many_origin 20000
	get_many 1 60
	wait_for 10 'get_many 61 62; grep "sweeper .* hangs: it is killed" err' ||
		fail "it is not killed"
	rm walk-halted
	wait_for 20 'get_many 61 62; [ "$(there 61 62)" = 2 ]' ||
		fail "nothing is stored any more"
}

test_cache_sweep_link() { # a cache that is a link is swept; a link in it is not followed
	mkdir real others
	ln -s real cache
	for n in 1 2 3; do
		head -c 300000 /dev/zero > "others/$n"
	done
	start_cache -s 1M
	ln -s ../others real/ab
	many_origin 20000
	n=1
	while [ $n -le 120 ]; do
		get_many $n $((n + 9))
		"$peer" sleep 50
		n=$((n + 10))
	done
	find real -type f > left
	# An entry may be stored by way of the link.
	[ "$(find others -name '[123]' | wc -l)" = 3 ] ||
		fail "others' files are gone"
	[ "$(wc -l < left)" -gt 5 ] || fail "nothing is stored"
	[ "$(find real -type f -exec du -k {} + |
	    awk '{ n += $1 } END { print n }')" -le 1024 ] || fail "too much"
	lacks err "can't read"
}

# Forty answers of unknown length, each 60000 bytes, five at once.
get_chunked() {
	for n in 1 2 3 4 5; do
		for i in 1 2 3 4 5 6 7 8; do
			echo "ask /$n-$i"
		done | client_bg "chunked$n"
	done
	ends chunked1 chunked2 chunked3 chunked4 chunked5 '^open$'
}

test_cache_sweep_slow() { # however long the sweeper takes: never larger than -s
	: > walk-slow
	our_names
	start_cache -s 1M
	overfill 'middling objects' 20000 38
	overfill 'large objects' 250000 5
	overfill 'small objects' 10 300
	origin o <<'END'
reply 200 Cache-Control: max-age=9999\nTransfer-Encoding: chunked | EA60\n
chop 20000 10 \{60000:x}
send \n0\n\n
loop
END
	overfilled chunks get_chunked
	rm walk-slow
	# A sweeper in time: all goes on.
	wait_for 10 '[ "$(disk_use_all)" -le 720 ]' ||
		fail "$(disk_use_all) KiB stay"
	many_origin 20000
	# The sweeper's report comes a little after the disk is swept.
	wait_for 5 'get_many 1 8; [ "$(there 1 8)" = 8 ]' || fail "$(there 1 8) of 8 are stored"
	served
}

test_cache_unreadable() { # a directory that can't be read to its end is an error, never empty
	our_names
	start_cache -s 1M
	stop_proxy
	: > walk-fails
	for options in '-l 127.0.0.1:0' '-k http://x/'; do
		# shellcheck disable=SC2086 # options are words
		exits 1 -c cache $options
		has errors "^proxy: can't read the cache cache: "
	done
	rm walk-fails
	start_cache -s 1M
	many_origin 20000
	get_many 1 20
	: > walk-fails
	# What is there can't be known: it is not stored without end.
	overfill 'unreadable' 20000 60
	counts 1 err "^proxy: can't read the cache "
	served
}

# The descriptors of a process, but for the standard ones and those that it
# has from us, each what it is.
descriptors() {
	for descriptor in /proc/"$1"/fd/*; do
		descriptor_is=$(readlink "$descriptor")
		[ "${descriptor##*/}" -le 2 ] ||
			[ "$descriptor_is" = "$(readlink \
			    "/proc/$$/fd/${descriptor##*/}")" ] ||
			printf '%s\n' "$descriptor_is"
	done
}

# True if a process has N pipes and no more, but for a directory that it reads:
# has_pipes PID N
has_pipes() {
	descriptors "$1" | grep -v '/cache/..$' > held
	[ "$(grep -c '^pipe:' held)" = "$2" ] && [ "$(wc -l < held)" = "$2" ]
}

test_cache_descriptors() { # sweeper and helper hold nothing open that is not theirs
	[ -d /proc/self/fd ] || skip "no /proc"
	have ps || skip "no ps"
	our_names
	start_cache -s 1M -o "$T/access"
	wait_for 5 'has_children 1' || fail "children: $children"
	helper=$children
	origin long <<'END'
reply 200 Cache-Control: max-age=9\nTransfer-Encoding: chunked | 1\nx\n
await over
END
	client_bg c \
	    'send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; until x ; touch begun ; await over'
	comes begun
	descriptors "$proxy_pid" > all
	grep 'cache/tmp' all > /dev/null && grep socket: all > /dev/null ||
		fail "the proxy has $(cat all)"
	: > walk-halted
	many_origin 20000
	get_many 1 5
	wait_for 5 'has_children 2' || fail "no sweeper"
	sweeper=$(children | grep -v "^$helper\$")
	wait_for 5 'has_pipes "$sweeper" 1' || fail "the sweeper has $(cat held)"
	rm walk-halted
	kill -KILL "$helper"
	wait_for 10 '[ "$(children | grep -v -x -c -e "$helper" \
	    -e "$sweeper")" = 1 ]' || fail "no other helper"
	helper=$(children | grep -v -x -e "$helper" -e "$sweeper")
	wait_for 5 'has_pipes "$helper" 2' || fail "the helper has $(cat held)"
	touch over
	served
}

# Temporary files: those of processes that are gone go at the start, those of
# others when they are old; until then they count.
test_cache_temporary() { # temporary files of others count, and go when they are old
	cat > own <<'END'
: > cache/tmp.$$.1
exec "$@"
END
	start_cache -s 1M
	stop_proxy
	spawn other "$peer" sleep 60000
	: > "cache/tmp.$spawned.1"
	aged 2 "cache/tmp.$spawned.1"
	head -c 700000 /dev/zero > "cache/tmp.$spawned.2"
	proxy_wrap="sh own"
	start_cache -s 1M
	proxy_wrap=
	[ ! -e "cache/tmp.$spawned.1" ] || fail "an old file is still there"
	[ ! -e "cache/tmp.$proxy_pid.1" ] || fail "one of our number is there"
	[ -e "cache/tmp.$spawned.2" ] || fail "what may be written is gone"
	overfill 'with a file of 684 KiB' 20000 60
	[ -e "cache/tmp.$spawned.2" ] || fail "what may be written is gone"
	stop_proxy
	start_cache -s 1M
	aged 2 "cache/tmp.$spawned.2"
	# This makes the sweeper look again.
	get_many 1 60
	wait_for 5 '[ ! -e "cache/tmp.$spawned.2" ]' ||
		fail "an old file is never removed"
	served
}

test_cache_temporary_ours() { # what the proxy is storing stays, though the clock has gone on by hours
	start_cache -s 1M
	origin slow 'head ; say 200 Cache-Control: max-age=9999\nContent-Length: 6 | abc ; touch half ; await go ; send def'
	slow=$origin
	client_bg c "send GET http://$slow/ HTTP/1.1\nHost: x\n\n ; answer"
	comes half
	wait_for 5 '[ -n "$(find cache -name "tmp.*")" ]' || fail "no file"
	aged 2 cache/tmp.*
	many_origin 20000
	get_many 1 10
	get_many 11 20
	"$peer" sleep 200
	: > go
	ends c '^open$'
	has log "GET http://$slow/ HTTP/1.1\" 200 6 .* miss=stored"
}

test_cache_sweep_markers() { # what turned out too large leaves nothing behind, Vary or not
	start_cache -s 256K
	origin o <<'END'
replies 200 Cache-Control: max-age=9999\nVary: X-A\nTransfer-Encoding: chunked | 11170\n\{70000:x}\n0\n\n
END
	get_many 1 200
	wait_for 5 '[ "$(disk_use)" -le 256 ]' ||
		fail "$(disk_use) KiB of 256 in $(entries | wc -l) files"
	served
}

test_cache_sweep_future() { # what was stored when the clock was wrong, later than now, goes first
	start_cache -s 1M
	many_origin 20000
	get_many 1 15
	wait_for 5 '[ "$(there 1 15)" = 15 ]' || fail "of 15 there are $(there 1 15)"
	find cache/?? -type f > later
	while read -r entry; do
		aged -9 "$entry"
	done < later
	get_many 16 24
	n=15
	while [ $((n += 1)) -le 24 ]; do
		aged 1 "$(entry_of $n)"
	done
	get_many 25 32
	wait_for 5 '[ "$(there 1 15)" -lt 15 ]' || fail "they stay"
	[ "$(there 16 24)" = 9 ] || fail "of 9 others there are $(there 16 24)"
}

test_cache_disk_unknown() { # a file system in memory without a size has room
	mkdir disk
	mount -t ramfs ramfs "$T/disk" 2> mount.err ||
		skip "cannot mount: $(head -n 1 mount.err)"
	trap 'stop_proxy; umount "$T/disk"; reap' EXIT
	start_proxy -c disk/cache
	play 'stored' <<'END'
	reply  200 Cache-Control: max-age=9 | ok
	ask    / = 200; fwd=uri-miss
	ask    / = 200; hit | ok
END
	lacks err 'the disk'
}

test_cache_sweep_childless() { # started with SIGCHLD ignored, it sweeps more than once
	proxy_wrap="$peer childless"
	start_cache -s 1M
	proxy_wrap=
	many_origin 20000
	get_many 1 90
	wait_for 5 'get_many 91 91; [ "$(there 91 91)" = 1 ]' ||
		fail "nothing is stored any more: $(disk_use) KiB"
}

test_cache_sweep_restart() { # a directory that is too full is swept at the start
	start_cache -s 10M
	many_origin 20000
	get_many 1 60
	[ "$(disk_use)" -ge 1200 ] || skip "files take $(disk_use) KiB here"
	all_aged 9 1 3
	all_aged 1 4 60
	stop_proxy
	start_cache -s 10M
	served
	"$peer" sleep 300
	wait_for 5 '[ "$(there 1 60)" = 60 ]' || fail "without need $(there 1 60) of 60 stay"
	stop_proxy
	# Nobody asks for anything.
	start_cache -s 1M
	wait_for 10 '[ "$(disk_use)" -le 1024 ]' || fail "$(disk_use) KiB stay"
	wait_for 5 '[ "$(there 1 3)" = 0 ]' || fail "the oldest are still there"
	[ "$(disk_use)" -ge 400 ] || fail "only $(disk_use) KiB are left"
	served
}

test_cache_recency() { # a hit renews an entry's time, every ten minutes at most
	start_cache
	fresh_origin
	get_fresh
	entry
	aged 1 "$entry_file"
	younger 0:59 "$entry_file" && fail "its time can't be set"
	get_fresh
	younger 0:10 "$entry_file" || fail "a hit does not renew its time"
	# Whatever the proxy remembers of it: what is recent stays as it is.
	aged 0:05 "$entry_file"
	get_fresh
	younger 0:04 "$entry_file" && fail "renewed after five minutes"
	younger 0:07 "$entry_file" || fail "it has got older"
	stop_proxy
	younger 0:07 "$entry_file" || fail "the time is lost with the proxy"
	start_cache
	get_fresh
	younger 0:04 "$entry_file" && fail "after a restart: renewed too early"
	younger 0:07 "$entry_file" || fail "it has got older after a restart"
	stop_proxy
	start_cache
	aged 0:11 "$entry_file"
	get_fresh
	younger 0:05 "$entry_file" || fail "not renewed after eleven minutes"
	stop_proxy
	start_cache
	aged -1 "$entry_file"
	get_fresh
	younger -0:05 "$entry_file" && fail "a time that is still to come stays"
	# A validation and a part of it are uses too.
	for fields in 'Cache-Control: max-age=0\n' 'Range: bytes=1-2\n'; do
		stop_proxy
		start_cache
		entry
		aged 1 "$entry_file"
		client u \
		    "send GET http://%O/x HTTP/1.1\nHost: %O\n$fields\n ; until \n\n"
		entry
		younger 0:10 "$entry_file" || fail "$fields: not renewed"
	done
	play 'a marker is used with its variants' <<'END'
	reply  200 Cache-Control: max-age=999\nVary: X-A | one
	a: ask / = 200 | one
	a: ends .
	do     wait_for 5 'marker=$(grep -l "^vary: x-a" cache/*/*)' || fail "no marker"
	do     aged 1 "$marker"
	b: ask / = 200; hit | one
	b: ends .
	do     younger 0:10 "$marker" || fail "its time is not renewed"
END
}

# Mounts a disk of SIZE for the cache, until the test ends: small_disk SIZE
small_disk() {
	[ "$(id -u)" = 0 ] || skip "only root can mount a small disk"
	mkdir "$T/cache"
	mount -t tmpfs -o "size=$1" tmpfs "$T/cache" 2> mount.err ||
		skip "no tmpfs: $(head -n 1 mount.err)"
	trap 'reap; umount "$T/cache" || umount -l "$T/cache"' EXIT
}

# The disk limits the cache, which is said once; then entries FROM to TO are
# stored: disk_limits FROM TO
disk_limits() {
	get_many "$1" "$2"
	wait_for 5 "[ \"\$(there $1 $2)\" = $(($2 - $1 + 1)) ]" ||
		fail "only $(there "$1" "$2") are stored"
	counts 1 err '^proxy: the disk, not -s, limits the cache'
	served
}

test_cache_disk_inodes() { # no inodes left: the oldest entries make room
	small_disk 16M,nr_inodes=300
	start_cache
	many_origin 10
	get_many 1 320
	[ "$(entries | wc -l)" -lt 320 ] || skip "inodes have no limit here"
	wait_for 5 '[ "$(entries | wc -l)" -lt 220 ]' ||
		fail "$(entries | wc -l) entries, nothing goes"
	disk_limits 1001 1010
}

test_cache_disk_small() { # a disk smaller than -s: the oldest entries make room
	small_disk 2M
	start_cache
	many_origin 20000
	get_many 1 90
	wait_for 5 '[ "$(disk_use)" -lt 1500 ]' || fail "$(disk_use) KiB stay"
	[ "$(entries | wc -l)" -gt 20 ] || fail "only $(entries | wc -l) stay"
	disk_limits 201 205
}

# So many KiB are still free on it.
disk_free() {
	df -P -k "$T/cache" | awk 'NR == 2 { print $4 }'
}

test_cache_floor() { # on a disk that is nearly full nothing is stored
	small_disk 1M
	start_cache
	fresh_origin
	get_twice 10000 1
	# 40 KiB are less than a twentieth, though an entry would fit.
	head -c $((($(disk_free) - 40) * 1024)) /dev/zero > cache/aa ||
		fail "the disk can't be filled"
	[ "$(disk_free)" -ge 36 ] && [ "$(disk_free)" -le 44 ] ||
		fail "$(disk_free) KiB are free"
	rm cache/[0-9a-f][0-9a-f]/*
	head -c 10240 /dev/zero > cache/ab
	get_twice 10000 3
	nothing_left
	logged <<'END'
~ miss=stored
~ hit=fresh
~ 200 10000 .* miss=no-room .* end=done
~ 200 10000 .* miss=no-room .* end=done
END
	# There is room again.
	rm cache/aa
	get_twice 10000 4
	served
}

test_cache_floor_middle() { # a disk that gets full while storing costs the entry only
	small_disk 1M
	start_cache
	what='known length'
	fresh_origin 2000000
	get_twice 2000000 2 none
	what=chunks
	origin o <<'END'
reply 200 Connection: close\nCache-Control: max-age=999\nTransfer-Encoding: chunked
send F4240\n ; fill 1000000 ; send \nF4240\n ; fill 1000000 ; send \n0\n\n
END
	for c in a b; do
		getter $c /x 2000000
		ends $c '^eof$'
	done
	asked 2
	nothing_stored
	logged <<'END'
#4 200 2000000 .* miss=no-room .* end=done
!~ hit=
END
	what='what fits'
	fresh_origin 9000
	get_twice 9000 1
	served
}

# Writes into "want" which files have the key: keyed KEY
keyed() {
	find cache -type f -exec grep -l -x -F "key: $1" {} + | sort > want
}

# What -k prints for each URL must be the files in "want": purged URL...
purged() {
	for purged_url; do
		run_proxy -c cache -k "$purged_url"
		[ "$status" = 0 ] && [ ! -s errors ] ||
			fail "-k $purged_url: status $status: $(cat errors)"
		sort out | cmp want - > /dev/null || fail "-k $purged_url:" \
		    "$(tr '\n' ' ' < out), not $(tr '\n' ' ' < want)"
	done
}

test_cache_purge() { # -k prints the files of a URL, however it is spelt
	origin o 'replies 200 Vary: X-A\nCache-Control: max-age=99 | one\l'
	start_cache -x "http://$origin"
	host=some.example
	urls="http://$host/v http://$host/vv http://$host/v?a http://$host/
	    http://$host:8080/v http://other.example/v"
	for url in $urls; do
		# shellcheck disable=SC2030 # in a pipeline of its own
		for a in 1 2 3; do
			echo "ask $url X-A: $a"
		done
	done | client c
	[ "$(entries | wc -l)" -eq 24 ] || fail "$(entries | wc -l) files"
	for url in $urls; do
		keyed "$(echo "$url" | sed 's|example/|example:80/|')"
		[ "$(wc -l < want)" -eq 4 ] || fail "$url: $(wc -l < want) files"
		purged "$url"
	done
	keyed "http://$host:80/v"
	purged "HTTP://$host/v" http://SOME.example/v "http://$host:80/v" \
	    HTTP://Some.Example:80/v "http://$host:080/v" \
	    "http://bob:pw@$host/v#part"
	keyed "http://$host:80/"
	purged "http://$host/" "http://$host" "HTTP://$host:80"
	play -n 'it is still there' <<END
	ask    http://SOME.Example:80/v X-A: 2 = 200; hit
	log    hit=fresh
END
	# shellcheck disable=SC2046 # paths are words
	rm $(cd "$T" && "$proxy_bin" -c cache -k "http://$host/v")
	: > want
	purged "http://$host/v" "http://$host/V" "http://$host/none" \
	    http://none.example/v "http://$host:81/v" "http://$host/v?"
	play -n 'gone, but not the others' <<END
	ask    http://$host/v X-A: 1 = 200
	ask    http://$host/v X-A: 1 = 200
	ask    http://$host/v X-A: 2 = 200
	ask    http://$host/vv X-A: 3 = 200
	log    miss=stored
	log+~  hit=fresh
	log+~  miss=stored
	log+~  /vv .* hit=fresh
END
}

test_cache_purge_odd() { # -k passes over what is no entry
	start_cache
	mkdir -p cache/aa
	mkfifo cache/aa/fifo
	ln -s fifo cache/aa/link
	mkdir cache/aa/directory
	: > cache/aa/empty
	: > want
	purged http://some.example/none
}

test_cache_purge_usage() { # wrong use of -k: exit 2, and nothing is made
	mkdir empty
	while read -r options; do
		# shellcheck disable=SC2086 # options are words
		exits 2 $options
		[ ! -s out ] || fail "$options: prints $(cat out)"
		has errors '^proxy: ..*'
	done <<'END'
-k http://some.example/
-k
-c empty -k
-c empty -k some.example
-c empty -k /v
-c empty -k https://some.example/
-c empty -k http://
-c empty -k http://some.example:0/
-c empty -k http://some.example:99999/
-c empty -k http://some.example/ http://other.example/
END
	exits 0 -c empty -k http://some.example/
	exits 1 -c none -k http://some.example/
	[ ! -s out ] || fail "no directory: prints $(cat out)"
	has errors "can't read the cache none: "
	[ ! -e none ] || fail "it makes a directory"
	[ -z "$(ls empty)" ] || fail "it makes $(ls empty)"
}

# ---- 16. Cache: fetches -----------------------------------------------------

test_cache_incomplete() { # a body cut short is never an entry
	start_cache
	play 'Content-Length, then the end' <<'END'
	reply  200 Cache-Control: max-age=99\nContent-Length: 9 | hello
	origin next
	reply  200 Cache-Control: max-age=99 | hello you
	ask    /
	sees   -- end eof answer
	log    end=server
END
	for cut in '5\nhello\n' '5\nhello\n0\n' '5\nhel' '5\nhello\nx\n' \
	    '5\nhello\n0\rX\n'; do
		play -n "chunks cut: $cut" <<END
	reply  200 Cache-Control: max-age=99\nTransfer-Encoding: chunked | $cut
	ask    /
	sees~  -- end (eof|reset) answer
	log    end=(server|reset)
END
	done
	play 'a reset' <<'END'
	reply  200 Cache-Control: max-age=99\nConnection: close
	origin send hello ; stall 100 ; reset
	ask    /
	sees~  -- end (eof|reset) answer
	log    end=(server|reset)
END
	nothing_stored
	play 'the next is asked for, and stored' <<'END'
	reply  200 Cache-Control: max-age=99\nContent-Length: 9 | hel
	origin next
	reply  200 Cache-Control: max-age=99 | ok\l
	a: ask /
	a: sees -- end eof answer
	a: ends .
	b: ask / = 200 | ok\l
	b: ask / = 200; hit | ok\l
	gets#  2 ^GET /
END
}

test_cache_bodies() { # chunks and bodies to the close are stored whole
	start_cache
	play chunks <<'END'
	reply  200 Cache-Control: max-age=99\nTransfer-Encoding: chunked\nTrailer: X-T
	origin chop 1 1 6\nhello\l\n6;x\nworld\l\n0\nX-T: 1\n\n
	ask    / = 200; fwd=uri-miss; fwd-status=200; stored$
	ask    / = 200; hit | hello\l
	sees+  world\l
	ask    1.0 /
	sees+  HTTP/1.1 200 OK
	sees   Connection: close
	sees   hello\l
	sees+  world\l
	sees+  -- end eof
	sees#  2 ^Content-Length: 12$
	gets#  1 ^GET
	log    HTTP/1.1" 200 12 .* miss=stored
	log    HTTP/1.1" 200 12 .* hit=fresh
	log    HTTP/1.0" 200 12 .* hit=fresh
	== to the close, first to a 1.0 client
	origin head ; send HTTP/1.0 200 OK\nCache-Control: max-age=99\n\nhel
	origin stall 50 ; send lo\l
	a: ask 1.0 / = 200 | hello\l
	a: sees+ -- end eof
	a: ends .
	b: ask / = 200 OK | hello\l
	b: sees+ -- end open
	b: sees# 1 ^Content-Length: 6$
	b: sees# 1 ^Age: 
	b: sees# 1 ^Via: 1.0 proxy-ID$
	log    HTTP/1.0" 200 6 .* miss=stored
	== empty
	reply  200 Cache-Control: max-age=99 |
	ask    / = 200
	ask    / = 200
	sees#  2 ^Content-Length: 0$
	gets#  1 ^GET
	log    hit=fresh
	== large
	reply  200 Cache-Control: max-age=99\nContent-Length: 3000000
	origin fill 3000000
	a: send GET http://%O/big HTTP/1.1\nHost: %O\n\n ; until \n\n ; skip 3000000
	a: ends open
	b: send GET http://%O/big HTTP/1.1\nHost: %O\n\n ; until \n\n ; skip 3000000
	b: ends open
	log    /big HTTP/1.1" 200 3000000 .* hit=fresh
END
}

# GET /a is stored, METHOD URL answers STATUS and fields; then /a is asked for
# again (gone) or a hit (kept): unsafe WANT METHOD URL STATUS 'fields\n'
unsafe() {
	case $1 in
	gone) unsafe_see=two unsafe_n=2 ;;
	*) unsafe_see=one unsafe_n=1 ;;
	esac
	play -n "$2 $3, $4 ${5-}: /a is $1" <<END
	${unsafe_at:+origin -a 127.0.0.1 -p $unsafe_at}
	reply  200 Connection: close\nETag: "a"\nCache-Control: max-age=99 | one\l
	reply  $4\nConnection: close\n${5-} | for\l
	reply  200 Connection: close\nCache-Control: max-age=99 | two\l
	ask    /a = 200 | one\l
	ask    $2 $3 Content-Length: 0 = $4 | for\l
	ask    /a = 200 | $unsafe_see\l
	gets#  $unsafe_n ^GET /a HTTP
END
}

# The same with a Location that has the origin's own address for %P: it is
# known before the origin starts.
unsafe_own() {
	origin "port$plays" < /dev/null
	kill "$(tail -n 1 .pids)"
	"$peer" sleep 50
	unsafe_at=$origin_port
	unsafe gone POST /b '201 Created' "Location: $(printf %s "$1" |
	    sed "s/%P/$origin/")\\n"
	unsafe_at=
}

test_cache_invalidate() { # unsafe methods that succeed (RFC 9111 section 4.4)
	start_cache
	for method in PUT POST DELETE PATCH FOO; do
		unsafe gone $method /a '200 OK'
	done
	unsafe gone POST /a '201 Created'
	unsafe gone PUT /a '303 Look'
	for status in '400 No' '403 No' '500 No' '503 No'; do
		unsafe kept POST /a "$status"
	done
	unsafe kept OPTIONS /a '200 OK'
	unsafe kept POST /b '200 OK'
	unsafe kept POST '/a?x' '200 OK'
	unsafe gone POST /b '201 Created' 'Location: /a\n'
	unsafe gone POST /b '200 OK' 'Content-Location: /a\n'
	unsafe gone POST /b '302 OK' 'Content-Location: /a\nLocation: /c\n'
	unsafe kept POST /b '400 No' 'Location: /a\n'
	unsafe kept GET /b '200 OK' 'Location: /a\n'
	unsafe_own HTTP://%P/a
	unsafe_own http://%P/a
	unsafe kept POST /b '201 Created' 'Location: http://127.0.0.1:9/a\n'
	play 'not what another server has' <<END
	reply  201 Created\nLocation: http://$origin/a\nContent-Location: //$origin/a | ok\l
	ask    POST / Content-Length: 0 = 201 | ok\l
	ask    http://$origin/a = 200 | one\l
	log    hit=fresh
END
	play -n 'all variants go' <<'END'
	reply  200 Connection: close\nVary: X-A\nCache-Control: max-age=99 | ok\l
	ask    / X-A: 1 = 200 | ok\l
	ask    / X-A: 2 = 200 | ok\l
	ask    DELETE / = 200 | ok\l
	ask    / X-A: 1 = 200 | ok\l
	ask    / X-A: 2 = 200 | ok\l
	gets#  4 ^GET
	gets#  1 ^DELETE
END
	# References are resolved before (RFC 3986).
	unsafe_own http://%P/a#x
	unsafe_own //%P/a
	unsafe gone POST /b '200 OK' 'Location: a\n'
	unsafe gone POST /b '200 OK' 'Content-Location: ./a\n'
	unsafe gone POST '/a?x' '200 OK' 'Location: /a#there\n'
	unsafe gone POST /b/c/d '200 OK' 'Location: ../../a\n'
	unsafe gone POST /b/c '200 OK' 'Content-Location: ./.././../c/../a\n'
	unsafe gone POST /b '200 OK' 'Location: /b/../c/./../a\n'
	unsafe_own http://%P/b/../a
	unsafe kept POST /b/c '200 OK' 'Location: a\nContent-Location: ../a/.\n'
	play 'a reference of a query alone is one to the same path' <<'END'
	reply  200 Connection: close\nCache-Control: max-age=99 | one\l
	reply  200 Connection: close\nLocation: ?n=http://1 | for\l
	reply  200 Connection: close\n | two\l
	ask    /a/b?n=http://1 = 200 | one\l
	ask    POST /a/b?n=2 Content-Length: 0 = 200 | for\l
	ask    /a/b?n=http://1 = 200; fwd= | two\l
END
	stop_proxy
	start_cache -e 'deny type text/odd' -e 'answer 200 "ok" method POST'
	play 'a response that a rule forbids does so, too; one that a rule makes does not' <<'END'
	reply  200 Connection: close\nCache-Control: max-age=99 | one\l
	reply  200 Connection: close\nContent-Type: text/odd | odd\l
	reply  200 | two\l
	ask    / = 200 | one\l
	ask    POST / Content-Length: 0 = 200 | ok
	ask    / = 200; hit | one\l
	ask    PUT / Content-Length: 0 = 403
	ask    / = 200; fwd= | two\l
END
}

test_cache_client_gone() { # a client that leaves leaves nothing half behind
	start_cache
	origin slow <<'END'
reply 200 Connection: close\nCache-Control: max-age=999\nContent-Length: 1000000
fill 100000 ; await go ; fill 900000
---
reply 200 Connection: close\nCache-Control: max-age=999\nContent-Length: 1000000
fill 1000000
END
	client c \
	    'send GET http://%O/x HTTP/1.1\nHost: %O\n\n ; until \n\n ; skip 50000 ; reset'
	touch go
	get_fresh 1000000
	get_fresh 1000000
	nothing_left
	served
}

test_cache_large() { # more than a quarter of -s is passed on, not stored
	start_cache -s 1M
	what='by length'
	fresh_origin 300000
	get_twice 300000 2 none
	what='to the close'
	origin o 'reply 200 Cache-Control: max-age=999 ; fill 300000'
	for c in a b; do
		getter $c /x 300000
		ends $c '^eof$'
	done
	asked 2
	nothing_stored
	what='200000 of 1M'
	fresh_origin 200000
	get_twice 200000 1
	[ -n "$(entries)" ] || fail "$what is not stored"
	served
}

# What clients sent before this has been read by the proxy when it returns,
# for the proxy takes things in their order.
taken() {
	comes "$@"
	play_title=${what-}
	served
}

test_cache_floor_follower() { # nor the answer of a client that follows
	small_disk 1M
	start_cache
	# What can't be asked for again is not followed where there is no room.
	for what in 'ETag: "a"\n' ''; do
		rm -f more a.* b.* o.*
		origin o <<END
reply 200 Connection: close\nCache-Control: max-age=999\n${what}Content-Length: 2000000
fill 100000 ; await more ; fill 1900000
---
reply 200 Connection: close\nCache-Control: max-age=999\n${what}Content-Length: 2000000
fill 2000000
END
		for c in a b; do
			getter $c /x 2000000
			taken $c.some
		done
		asked $((${#what} > 0 ? 1 : 2))
		touch more
		ends a b '^eof$'
		nothing_stored
	done
	served
}

# Bytes that the proxy writes to files of the cache while a client gets so many
# of /x, into $written; empty if nobody can tell: count_written BYTES
count_written() {
	written=
	if have strace && spawn strace.err strace -y -o calls -p "$proxy_pid" \
	    -e trace=write,writev,pwrite64,pwritev &&
	    wait_for 10 '[ -s strace.err ]' &&
	    grep 'attached' strace.err > /dev/null; then
		get_fresh "$1"
		kill "$spawned"
		wait "$spawned"
		written=$(sed -n 's|^[a-z0-9]*([0-9]*<[^>]*/cache/.* = ||p' calls |
			awk '{ sum += $1 } END { print sum + 0 }')
	elif [ -r "/proc/$proxy_pid/io" ]; then
		count_from=$(sed -n 's/^wchar: //p' "/proc/$proxy_pid/io")
		get_fresh "$1"
		# What the client got was written too.
		written=$(($(sed -n 's/^wchar: //p' "/proc/$proxy_pid/io") -
		    count_from - $1))
	fi
}

test_cache_validated_large() { # validating 20 MiB writes a few KiB
	[ "$(df -P -k . | awk 'NR == 2 { print $4 }')" -gt 100000 ] ||
		skip "too little room on the disk"
	start_cache -s 100M
	origin o <<'END'
reply 200 Connection: close\nETag: "a"\nX-A: old\nCache-Control: max-age=0\nContent-Length: 20971520
fill 20971520
---
reply 304 Connection: close\nETag: "a"\nX-A: new\nCache-Control: max-age=9999
END
	get_fresh 20971520
	entry
	count_written 20971520
	echo "$written bytes are written"
	[ -n "$written" ] || skip "neither strace nor /proc/PID/io"
	seen g <<'END'
= X-A: new
~ ^Cache-Status: proxy-ID; fwd=stale; fwd-status=304
END
	[ "$written" -gt 0 ] && [ "$written" -lt 65536 ] || fail "$written bytes are written"
	asked 2
	get_fresh 20971520
	asked 2
	seen g <<'END'
= X-A: new
~ ^Cache-Status: proxy-ID; hit; ttl=[0-9]
END
	logged <<'END'
~ 200 20971520 .* miss=stored
~ 200 20971520 .* hit=validated
~ 200 20971520 .* hit=fresh
END
	[ "$(entries)" = "$entry_file" ] || fail "it became $(entries)"
}

# How a body of BYTES is framed, into $how, behind its fields, and $end:
# framed length|chunks|close BYTES
framed() {
	end=
	case $1 in
	length) how="Content-Length: $2" ;;
	chunks) how="Transfer-Encoding: chunked | $(printf %X "$2")\\n" end='; send \n0\n\n' ;;
	close) how='Connection: close' end='; close' ;;
	esac
}

# Two clients, one fetch: the second one's log line and Cache-Status.
collapsed() {
	seen "$1" <<'END'
= HTTP/1.1 200 OK
~ ^Cache-Status: proxy-ID; fwd=uri-miss.*; collapsed
END
	logged <<'END'
#1 miss=stored .* end=done$
#1 hit=collapsed .* end=done$
END
	log_from=$(($(wc -l < log) + 1))
}

test_cache_collapsed() { # two clients, one request; both are served as it comes
	start_cache
	log_from=1
	for what in length chunks close; do
		rm -f go more
		framed $what 300000
		middle=
		[ $what != chunks ] || {
			framed chunks 150000
			middle='send \n249F0\n ;'
		}
		origin o <<END
head ; await go ; say 200 Cache-Control: max-age=999\nX-A: b\n$how
fill 150000 ; await more ; $middle fill 150000 $end
END
		getter a /x 300000
		reached 1
		getter b /x 300000
		taken b.sent
		asked 1
		touch go
		# Both have what is there while the rest has not come yet.
		comes a.some b.some
		[ ! -f a.end ] && [ ! -f b.end ] ||
			fail "$what: $(cat a.end b.end)"
		touch more
		ends a b '^eof$'
		asked 1
		collapsed b
		getter c /x 300000
		ends c '^eof$'
		asked 1
		log_from=$(($(wc -l < log) + 1))
	done
}

test_cache_collapsed_growing() { # who comes in the middle of a chunked answer follows
	start_cache
	origin o <<'END'
reply 200 Cache-Control: max-age=999\nTransfer-Encoding: chunked | 5\nfirst\n
await more ; send 6\nsecond\n ; await last ; send 5\nthird\n0\n\n
END
	for c in a b c; do
		client_bg $c <<END
send GET http://%O/ HTTP/1.1\nHost: %O\n\n
until first ; touch $c.first ; until second ; touch $c.second
until third ; until \n0\n\n ; ask /
END
		taken $c.first
	done
	asked 1
	touch more
	taken a.second b.second c.second
	touch last
	ends a b c '^open$'
	for c in a b c; do
		seen $c <<'END'
#1 ^Transfer-Encoding: chunked$
#1 ^Content-Length
~ first
~ second
~ third
~ ^HTTP/1.1 200 OK
~ ^firstsecondthird
END
	done
	asked 1
	logged <<'END'
#1 200 16 .* miss=stored .* end=done$
#2 200 16 .* hit=collapsed .* end=done$
#3 200 16 .* hit=fresh .* end=done$
END
}

test_cache_collapsed_not() { # who waits and then asks the server nevertheless is not collapsed
	start_cache
	play 'two validate what is always stale' <<'END'
	reply  200 Connection: close\nCache-Control: max-age=0\nETag: "a" | one\l
	origin next
	origin head ; touch asked ; await go
	origin say 304 Connection: close\nCache-Control: max-age=0\nETag: "a"
	origin next
	reply  304 Connection: close\nCache-Control: max-age=0\nETag: "a"
	a: ask / = 200; fwd=uri-miss | one\l
	a: ends .
	b: ask / = 200; fwd=stale; fwd-status=304; ttl=[-0-9]+$ | one\l
	do comes asked
	c: send GET http://%O/ HTTP/1.1\nHost: %O\n\n
	c: touch c.sent ; answer
	c: sees~ ^Cache-Status: [^;]*; fwd=stale; fwd-status=304; ttl=[-0-9]+$
	do taken c.sent
	do asked 2
	do touch go
	b: ends .
	c: ends .
	log    hit=validated
	log    hit=validated
END
}

test_cache_collapsed_private() { # what can't be stored is fetched for each
	start_cache
	for what in '200 OK\nCache-Control: private, max-age=999' \
	    '200 OK\nCache-Control: no-store' '200 OK\n' '404 No\n'; do
		rm -f asked go
		play -n "$what" <<END
	origin head ; touch asked ; await go
	origin say $what\nConnection: close | one\l
	origin next
	reply  $what\nConnection: close | two\l
	a: send GET http://%O/ HTTP/1.1\nHost: %O\n\n
	a: touch a.sent ; answer
	a: sees HTTP/1.1 ${what%%\\*}
	a: sees one\l
	do taken a.sent asked
	b: send GET http://%O/ HTTP/1.1\nHost: %O\n\n
	b: touch b.sent ; answer
	b: sees HTTP/1.1 ${what%%\\*}
	b: sees!~ ^Cache-Status:.*(collapsed|hit)
	b: sees two\l
	do taken b.sent
	do asked 1
	do touch go
	a: ends ^open$
	b: ends ^open$
	do asked 2
	log!   hit=
END
	done
}

test_cache_collapsed_many() { # ten at once on what can't be stored wait for one answer, not for nine
	start_cache
	origin o <<'END'
head ; touch asked ; await go ; stall 300
say 200 Connection: close\nCache-Control: private | one\l
---
head ; await all ; stall 300
say 200 Connection: close\nCache-Control: private | two\l
END
	for n in 1 2 3 4 5 6 7 8 9 10; do
		client_bg c$n \
		    "send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; touch sent$n ; answer"
		taken sent$n asked
	done
	asked 1
	touch go
	# Nine more before any of them is answered.
	wait_for 10 '[ -s o.10 ]' || fail "of ten requests the origin has" \
		"$(find . -name 'o.*' ! -name '*.*.*' -size +0 | wc -l)"
	touch all
	ends c1 c2 c3 c4 c5 c6 c7 c8 c9 c10 '^open$'
	for want in one=1 two=9; do
		n=$(grep -c "^${want%=*}" c? c10 | grep -c ':1$')
		[ "$n" = "${want#*=}" ] || fail "$n clients got $want"
	done
	asked 10
}

test_cache_collapsed_known() { # what can't be stored is still known after 2000 other URLs
	start_cache
	origin many 'replies 200 Cache-Control: private | any\l'
	many=$origin
	origin o <<'END'
reply 200 Connection: close\nCache-Control: private | one\l
---
head ; await go ; say 200 Connection: close\nCache-Control: private | one\l
END
	awk -v O="$many" 'BEGIN {
		print "ask /"
		for (n = 0; n < 2000; n++)
			print "ask http://" O "/" n
	}' | client first
	ends first '^open$'
	for n in 1 2; do
		client_bg c$n 'ask /'
	done
	wait_for 5 '[ -s o.2 ] && [ -s o.3 ]' || fail "the second waits again"
	touch go
	ends c1 c2 '^open$'
}

# While one client waits for a head (await) or has a part of the body (grow),
# a request of another kind goes to the origin at once, ask STEP:
# alone WHAT STEP [READ], which reads its body
alone() {
	for alone_when in await grow; do
		what="$1, $alone_when"
		rm -f asked go
		play -n "$what" <<END
	origin head ; touch asked
	origin $([ $alone_when = grow ] || echo await go)
	origin say 200 Connection: close\nCache-Control: public, max-age=999\nContent-Length: 300000
	origin fill 150000 ; await go ; fill 150000
	origin next
	origin head ; ${3-}
	origin say 200 Connection: close\nCache-Control: public, max-age=999 | two\l
	do getter a /x 300000
	do taken asked a.sent
	do [ $alone_when = await ] || taken a.some
	b: ask $2 = 200 | two\l
	b: sees!~ ^Cache-Status:.*(collapsed|hit)
	b: ends ^open$
	do asked 2
	do touch go
	do ends a '^eof$'
	do asked 2
	log!   hit=
END
	done
}

test_cache_collapsed_never() { # uploads, ranges, logins, If-Match and no-store neither wait nor follow
	start_cache
	alone POST 'POST /x | abc' 'want 3'
	alone PUT 'PUT /x Transfer-Encoding: chunked | 3\nabc\n0\n\n' 'until \n0\n\n'
	alone 'GET with a body' '/x | abc' 'want 3'
	alone Range '/x Range: bytes=1-4'
	alone Authorization '/x Authorization: Basic eDp5'
	alone If-Match '/x If-Match: "z"'
	alone If-Unmodified-Since '/x If-Unmodified-Since: Sun, 06 Nov 1994 08:49:37 GMT'
	alone no-store '/x Cache-Control: no-store'
}

# Clients a and b get /x of BYTES, both have some, and the origin was asked once:
# pair BYTES ['fields of b\n']
pair() {
	getter a /x "$1"
	taken a.some
	getter b /x "$1" "${2-}"
	taken b.some
	asked 1
}

# The fetch breaks off while another client follows, which then asks on its
# own: broken WANT 'first fields\n' 'second fields\n' [HOW [BYTES]]; the statuses are
# $first and $second, WANT is whole or short, HOW length (as without) or chunks,
# BYTES what comes then
broken() {
	what="$1: ${first-200} $2 then ${second-200} $3, ${4-length}"
	rm -f cut
	framed "${4-length}" 300000
	# To an HTTP/1.0 client only a reset tells that chunks end too early.
	[ "${4-length}" = length ] && short='^(eof|reset) skip' || short='^reset skip'
	origin o <<END
reply ${first-200} Cache-Control: max-age=999\n$2$how
fill 150000 ; await cut ; close
---
reply ${second-200} Connection: close\nCache-Control: max-age=999\n$3$how
fill ${5-300000} ${5+; close} $end
---
reply 200 Connection: close\nCache-Control: max-age=999\nContent-Length: 300000
fill 300000
END
	pair 300000
	touch cut
	ends a "$short"
	case $1 in
	whole) ends b '^eof$' ;;
	short) ends b "$short" ;;
	esac
	asked 2
	# What is stored then is whole.
	getter c /x 300000
	ends c '^eof$'
	getter d /x 300000
	ends d '^eof$'
	nothing_left
	served
}

test_cache_collapsed_broken() { # the fetch breaks off: who follows goes on alone, or ends visibly short
	start_cache
	modified='Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT\n'
	broken whole 'ETag: "a"\n' 'ETag: "a"\n'
	broken whole 'ETag: "a"\n' 'ETag: "a"\n' chunks
	broken whole "$modified" "$modified"
	broken short 'ETag: "a"\n' 'ETag: "b"\n'
	broken short 'ETag: "a"\n' 'ETag: "b"\n' chunks
	broken short 'ETag: "a"\n' 'ETag: "a"\n' length 200000
	broken short 'ETag: "a"\n' 'ETag: "a"\n' chunks 200000
	broken short 'ETag: W/"a"\n' 'ETag: W/"a"\n'
	broken short 'ETag: "a"\n' ''
	broken short "ETag: \"a\"\n$modified" "ETag: \"b\"\n$modified"
	broken short "$modified" 'Last-Modified: Mon, 07 Nov 1994 08:49:37 GMT\n'
	second=404
	broken short 'ETag: "a"\n' 'ETag: "a"\n'
	first=404
	broken whole 'ETag: "a"\n' 'ETag: "a"\n'
}

test_cache_collapsed_large() { # what grows too large is not stored, and whole for those who follow
	for etag in 'ETag: "a"\n' ''; do
		what="with ${etag:-no ETag}"
		rm -rf cache more
		start_cache -s 1M
		origin o <<END
reply 200 Cache-Control: max-age=999\n${etag}Transfer-Encoding: chunked | 927C0\n
fill 100000 ; await more ; fill 500000 ; send \n0\n\n
---
reply 200 Cache-Control: max-age=999\n${etag}Transfer-Encoding: chunked | 927C0\n
fill 600000 ; send \n0\n\n
END
		pair 600000
		touch more
		ends a b '^eof$'
		nothing_stored
		served
		stop_proxy
	done
}

test_cache_collapsed_dropped() { # who follows what stops being stored gets all the same
	start_cache -s 1M
	# Together they are more than may be in the making.
	for n in 1 2; do
		origin o$n <<END
reply 200 Cache-Control: max-age=999\nETag: "a"\nContent-Length: 200000
fill 100000 ; await more ; fill 100000
---
reply 200 Cache-Control: max-age=999\nETag: "a"\nContent-Length: 200000
fill 200000
END
		for c in a$n b$n; do
			getter "$c" /x 200000
			taken "$c.some"
		done
	done
	touch more
	ends a1 b1 a2 b2 '^eof$'
	served
}

test_cache_collapsed_room() { # one who follows takes no room on the disk in advance
	start_cache
	origin o <<'END'
reply 200 Cache-Control: max-age=999\nContent-Length: 50000000
fill 100000 ; await end
END
	pair 50000000
	n=$(du -k cache/tmp.* | awk '{ print $1 }')
	[ "$n" -lt 1000 ] || fail "$n KiB for 100 KB"
	touch end
}

# A client in the background that gets /x until there is a head (NAME.head), and
# resets the connection once it may leave (NAME.leave): leaver NAME
leaver() {
	client_bg "$1" <<END
send GET http://%O/x HTTP/1.1\nHost: %O\n\n ; until \n\n
touch $1.head ; await $1.leave ; reset
END
	taken "$1.head"
}

test_cache_collapsed_gone() { # the first client leaves: the others get all, and it is stored
	start_cache
	for what in length chunks; do
		rm -f more
		framed $what 300000
		origin o <<END
reply 200 Cache-Control: max-age=999\n$how
fill 100000 ; await more ; fill 200000 $end
END
		leaver a
		getter b /x 300000
		taken b.some
		touch a.leave
		ended a
		served
		touch more
		ends b '^eof$'
		get_fresh 300000
		asked 1
		logged <<'END'
~ end=client
END
		log_from=$(($(wc -l < log) + 1))
	done
}

# Clients a and b get /x by one fetch, and leave in this order: leavers NAME...
leavers() {
	leaver a
	leaver b
	asked 1
	for n; do
		touch "$n.leave"
		taken "$n.end"
	done
}

test_cache_collapsed_all_gone() { # when all have left early, the fetch ends
	start_cache
	origin o <<'END'
reply 200 Cache-Control: max-age=999\nContent-Length: 1000000
fill 100000 ; eof ; touch freed
END
	leavers b a
	comes freed
	nothing_stored
}

test_cache_collapsed_vary() { # variants: the same one follows, another one goes on its own
	start_cache
	origin o <<'END'
head ; touch asked ; await go
say 200 Cache-Control: max-age=999\nVary: X-A\nContent-Length: 300000
fill 150000 ; await more ; fill 150000
---
head ; touch asked2
say 200 Connection: close\nCache-Control: max-age=999\nVary: X-A | two\l
END
	getter a /x 300000 'X-A: 1\n'
	taken asked
	client_bg b \
	    'send GET http://%O/x HTTP/1.1\nHost: %O\nX-A: 2\n\n ; touch b.sent ; answer'
	getter c /x 300000 'X-A: 1\n'
	taken b.sent c.sent
	asked 1
	touch go
	# The other variant, while the first one is still on its way.
	ends b '^open$'
	seen b <<'END'
= HTTP/1.1 200 OK
= two\l
END
	taken a.some c.some
	asked 2
	# Who comes later follows too.
	getter d /x 300000 'X-A: 1\n'
	taken d.some
	asked 2
	touch more
	ends a c d '^eof$'
	asked 2
	for n in c d; do
		seen $n <<'END'
~ ^Cache-Status: .*; collapsed
END
	done
	logged <<'END'
#2 miss=stored .* end=done$
#2 hit=collapsed .* end=done$
END
	play -n 'both are there' <<'END'
	ask    /x X-A: 2 = 200; hit
	client send GET http://%O/x HTTP/1.1\nHost: %O\nX-A: 1\n\n ; until \n\n ; skip 300000
END
	[ ! -f o.3 ] || fail "the origin is asked again"
}

# The entries of the origin at hand, whatever their paths.
entries_here() {
	find cache -type f -exec grep -l "^key: http://$origin/" {} +
}

test_cache_vary_cut() { # an answer with Vary that is cut short leaves the older entry as it was
	start_cache
	for what in fresh stale; do
		case $what in
		fresh) age=0 wish='no-cache' ;;
		stale) age=500 wish='x' ;;
		esac
		play -n "$what" <<END
	reply  200 Connection: close\nCache-Control: max-age=99\nAge: $age\nETag: "a" | one\l
	reply  200 Connection: close\nCache-Control: max-age=99\nVary: X-A\nETag: "b"\nContent-Length: 10 | other
	a: ask /x = 200 | one\l
	a: ends ^open$
	do entries_here > there
	do [ "\$(wc -l < there)" -eq 1 ]
	do cp "\$(cat there)" before
	b: ask /x X-A: 1\nCache-Control: $wish
	b: sees~ ^-- end (eof|reset) answer
	b: ends .
	do asked 2
	do entries_here | cmp - there > /dev/null || fail "$what: the entry is gone"
	do cmp before "\$(cat there)" > /dev/null || fail "$what: the entry has changed"
	c: ask /x X-A: 1\nCache-Control: max-stale, only-if-cached = 200 OK | one\l
	c: ends .
	do asked 2
END
	done
}

# Two clients for one answer of BYTES, which is cut off once both have some of
# it; the second one's request goes to the origin again.  The origin's script
# is on standard input: followed BYTES ['fields of the second\n']
followed() {
	rm -f cut
	origin o
	pair "$@"
	touch cut
}

test_cache_resumed_kept() { # the connection on which a follower got the rest serves others
	start_cache
	followed 3000 <<'END'
reply 200 Cache-Control: max-age=999\nETag: "a"\nContent-Length: 3000
fill 1500 ; await cut ; close
---
reply 200 Cache-Control: max-age=999\nETag: "a"\nX-Pad: \{600:0}\nContent-Length: 3000
fill 3000
reply 200 | hello
END
	ends b '^eof$'
	patience 5000
	play -n 'its head is seen' <<'END'
	client send GET http://%O/y HTTP/1.1\nHost: %O\n\n ; until hello
END
	asked 2
}

# The answer is cut off while another client follows, and comes again with
# other bytes: mixed 'first fields\n' 'second fields\n'
mixed() {
	what="$1 then $2"
	followed 3000 <<END
reply 200 Cache-Control: max-age=999\n$1Content-Length: 3000
fill 1500 ; await cut ; close
---
reply 200 Connection: close\nCache-Control: max-age=999\n$2Content-Length: 3000
fill 3000
END
	ends b '^(eof|reset) skip'
	asked 2
}

test_cache_resumed_mixed() { # who follows never gets the rest of what may be another version
	start_cache
	modified='Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT\n'
	mixed "${modified}ETag: W/\"a\"\n" "${modified}ETag: W/\"b\"\n"
	mixed "$modified" "${modified}Content-Encoding: gzip\n"
	mixed 'ETag: "a"\n' 'ETag: "a"\nContent-Encoding: gzip\n'
	# It may have changed once more in that second.
	same=$(date -u '+%a, %d %b %Y %H:%M:%S GMT')
	same="Last-Modified: $same\nDate: $same\n"
	mixed "$same" "$same"
}

test_cache_resumed_short() { # what comes again and ends too early is no end
	start_cache
	for what in chunks close; do
		[ $what = chunks ] && framed chunks 1000 || how='' end=''
		followed 3000 <<END
reply 200 Cache-Control: max-age=999\nETag: "a"\nTransfer-Encoding: chunked | BB8\n
fill 1500 ; await cut ; close
---
reply 200 Connection: close\nCache-Control: max-age=999\nETag: "a"\n$how
fill 1000 $end
END
		ends b '^reset skip'
		asked 2
	done
}

test_cache_collapsed_cut() { # a file cut under one who follows: the answer is visibly short
	start_cache
	framed chunks 8000000
	origin o <<END
reply 200 Cache-Control: max-age=999\n$how
fill 4000000 ; await more ; fill 4000000 $end
END
	getter a /x 8000000
	taken a.some
	client_bg b <<'END'
send GET http://%O/x HTTP/1.1\nHost: %O\nConnection: close\n\n
until \n\n ; touch b.began ; await go ; until \n0\n\n
END
	taken b.began
	touch more
	ends a '^eof$'
	entry
	# More than what is on its way already.
	cut_to 7900000 "$entry_file"
	touch go
	ends b '^(eof|reset) until'
	asked 1
}

test_cache_collapsed_unwanted() { # an answer that nobody wants and that is not stored is not fetched
	start_cache -s 1M
	what=followed
	origin o <<'END'
reply 200 Cache-Control: max-age=999\nTransfer-Encoding: chunked | 989680\n
fill 10000 ; eof ; touch freed1
END
	leavers a b
	comes freed1
	play -n 'a refresh' <<'END'
	reply  200 Connection: close\nCache-Control: max-age=0, stale-while-revalidate=99\nETag: "a" | hello
	reply  200 Cache-Control: no-store\nTransfer-Encoding: chunked | 989680\n
	origin fill 10000 ; eof ; touch freed2
	ask    /x = 200 | hello
	ask    /x = 200 | hello
END
	comes freed2
}

test_cache_refresh_once() { # many at once on a stale entry: one refresh, and it is a GET
	start_cache
	for what in GET HEAD; do
		play -n "$what" <<'END'
	reply  200 Connection: close\nCache-Control: max-age=0, stale-while-revalidate=99\nETag: "a" | hello
	reply  200 Connection: close\nCache-Control: max-age=999\nETag: "b" | again
	ask    / = 200 | hello
END
		# They all come in one turn of the proxy.
		for n in 1 2 3 4 5 6; do
			client_bg r$n <<END
touch r$n.open ; await go
send $what http://%O/ HTTP/1.1\nHost: %O\n\n ; until \n\n
END
			taken r$n.open
		done
		kill -STOP "$proxy_pid"
		touch go
		"$peer" sleep 500
		kill -CONT "$proxy_pid"
		ends r1 r2 r3 r4 r5 r6 '^open$'
		rm -f go
		origin_name=o$plays
		reached 2
		served
		asked 2
		got "o$plays" <<'END'
= -- connection 2
= GET / HTTP/1.1
END
	done
}

test_cache_collapsed_gone_early() { # the first client leaves before the head comes: the others wait on
	start_cache
	for what in stored private; do
		rm -f go leave
		[ $what = stored ] && control=max-age=999 n=1 || control=private n=3
		play -n "$what" <<END
	origin head ; await go
	origin say 200 Connection: close\nCache-Control: $control | hello
	origin next
	reply  200 Connection: close\nCache-Control: $control | hello
	a: send GET http://%O/$what HTTP/1.1\nHost: %O\n\n ; await leave ; reset
	do reached 1
	b: send GET http://%O/$what HTTP/1.1\nHost: %O\n\n ; touch b.sent ; until hello
	do taken b.sent
	c: send GET http://%O/$what HTTP/1.1\nHost: %O\n\n ; touch c.sent ; until hello
	do taken c.sent
	do touch leave
	a: ends .
	do served
	do asked 1
	do touch go
	b: ends ^open$
	c: ends ^open$
	do asked $n
	log#   1 end=client$
END
	done
}

test_cache_resumed_rules() { # the rest is not asked for where the rules forbid it
	second_address
	start_names $second 127.0.0.1 -- -c "$T/cache" -e "deny address $second"
	twins origin forbidden <<'END'
reply 200 Cache-Control: max-age=999\nETag: "a"\nContent-Length: 3000
fill 1500 ; await cut ; close
---
reply 200 Connection: close\nCache-Control: max-age=999\nETag: "a"\nContent-Length: 3000
fill 3000
END
	origin=two.test:$origin_port
	pair 3000
	touch cut
	ends b '^eof$'
	asked 2
	[ ! -e forbidden.1 ] || fail "the forbidden address is asked"
}

test_cache_collapsed_slow_first() { # a first client that does not read holds up nobody who follows
	start_cache
	for what in length chunks; do
		rm -f go
		framed $what 16000000
		[ $what = length ] || how="ETag: \"a\"\\n$how"
		play -n "$what" <<END
	reply  200 Cache-Control: max-age=999\n$how
	origin fill 16000000 $end
	a: send GET http://%O/$what HTTP/1.0\n\n ; until \n\n ; touch a.head
	a: await go ; skip 16000000 ; eof
	do taken a.head
	do getter b /$what 16000000
	do ends b '^eof$'
	do touch go
	a: ends ^eof$
	do asked 1
	log#   1 200 16000000 .* miss=stored .* end=done$
	log#   1 200 16000000 .* hit=collapsed .* end=done$
END
	done
}

test_cache_collapsed_slow_gone() { # the same when all leave, or the server cuts it off
	start_cache
	for what in leave cut; do
		# Of what is left most has not come.
		case $what in
		leave) total=40000000 origin_end=eof client_end='reset ;' ;;
		cut) total=16000000 origin_end='' client_end='' ;;
		esac
		rm -f go cut freed
		origin o <<END
reply 200 Cache-Control: max-age=999\nETag: "a"\nContent-Length: $total
fill 15900000 ; await cut
$origin_end
touch freed ; close
---
reply 200 Connection: close\nCache-Control: max-age=999\nETag: "a"\nContent-Length: 16000000
fill 16000000
END
		client_bg a <<END
send GET http://%O/$what HTTP/1.0\n\n ; until \n\n ; touch a.head
await go ; $client_end skip 16000000 ; eof
END
		taken a.head
		client_bg b <<END
send GET http://%O/$what HTTP/1.0\n\n ; until \n\n ; touch b.head
skip 15800000 ; touch b.some ; await go ; $client_end skip 200000 ; eof
END
		taken b.head b.some
		asked 1
		case $what in
		leave)
			touch go
			ends a b .
			touch cut
			comes freed
			;;
		cut)
			touch cut go
			ends a b '^eof$'
			asked 3
			logged <<'END'
~ /cut .* miss=incomplete
!~ /cut .* miss=stored
END
			;;
		esac
		nothing_left
		served
	done
}

# ---- 17. Cache: look-ups and validation -------------------------------------

test_cache_cookie() { # an answer that sets a cookie is kept for the one who got it
	printf 'alice:a\nbob:b\n' > people
	chmod 600 people
	start_proxy -c "$T/cache" -e 'users people' -e 'login'
	alice='Proxy-Authorization: Basic YWxpY2U6YQ=='
	bob='Proxy-Authorization: Basic Ym9iOmI='
	play -n "not meant for all, and meant for all" <<END
	reply  200 Cache-Control: max-age=99\nSet-Cookie: for=alice | a\l
	reply  200 Cache-Control: max-age=99\nSet-Cookie: for=bob | b\l
	reply  200 Cache-Control: public, max-age=99\nSet-Cookie: for=all | c\l
	ask    / $alice = 200 | a\l
	ask    / $bob = 200 | b\l
	ask    / $alice = 200 | a\l
	ask    / $bob = 200 | b\l
	ask    /all $alice = 200 | c\l
	ask    /all $bob = 200 | c\l
	sees#  2 ^Set-Cookie: for=alice
	sees#  2 ^Set-Cookie: for=bob
	sees#  2 ^Set-Cookie: for=all
	log    - alice .* miss=stored
	log    - bob .* miss=stored
	log    - alice .* hit=fresh
	log    - bob .* hit=fresh
	log    - alice .* miss=stored
	log    - bob .* hit=fresh
END
}

test_cache_hit() { # a miss, then hits without the origin; both in one write, answers in order
	start_cache
	play 'the same URL three times, other ways to write it' <<'END'
	reply  200 Fine\nCache-Control: max-age=1000\nX-A: b\nContent-Type: text/x\nConnection: X-Hop, close\nX-Hop: 1\nKeep-Alive: x=y | hello\l
	ask    /a?b = 200 Fine; fwd=uri-miss; fwd-status=200; stored$ | hello\l
	ask    /a?b User-Agent: x = 200 Fine
	sees   Cache-Control: max-age=1000
	sees+  X-A: b
	sees+  Content-Type: text/x
	sees~  ^Age: [0-9]$
	sees~  ^Cache-Status: proxy-ID; hit; ttl=(1000|99[0-9])$
	sees   hello\l
	ask    HTTP://%O/a?b Connection: close = 200 Fine
	client eof
	sees   Connection: close
	sees   hello\l
	sees+  -- end eof
	sees#  3 ^Content-Length: 6$
	sees#  3 ^Via: 1.1 proxy-ID$
	sees#  3 ^Date: 
	sees!~ ^(X-Hop|Keep-Alive|Transfer-Encoding)
	gets#  1 ^GET 
	log    /a\?b HTTP/1.1" 200 6 "-" "-" miss=stored .* server=%O end=done$
	log    /a\?b HTTP/1.1" 200 6 "-" "x" hit=fresh up=0 .* server=- end=done$
	log    /a\?b HTTP/1.1" 200 6 "-" "-" hit=fresh
	== another URL is another entry
	reply  200 Cache-Control: max-age=1000 | 1 \l
	reply  200 Cache-Control: max-age=1000 | 2 \l
	reply  200 Cache-Control: max-age=1000 | 3 \l
	ask    /a = 200 | 1 \l
	ask    /A = 200 | 2 \l
	ask    /a? = 200 | 3 \l
	ask    /A = 200 | 2 \l
	ask    /a = 200 | 1 \l
	gets#  3 ^GET 
	== stored 1 and 3, then 1 2 3 1
	reply  200 Cache-Control: max-age=99 | one\l
	reply  200 Cache-Control: max-age=99 | three\l
	origin head ; stall 100 ; say 200 Cache-Control: max-age=99 | two\l
	ask    /1 = 200 | one\l
	ask    /3 = 200 | three\l
	client send GET http://%O/1 HTTP/1.1\nHost: %O\n\nGET http://%O/2 HTTP/1.1\nHost: %O\n\nGET http://%O/3 HTTP/1.1\nHost: %O\n\nGET http://%O/1 HTTP/1.1\nHost: %O\nConnection: close\n\n
	client eof
	sees   one\l
	sees   two\l
	sees   three\l
	sees   one\l
	sees+  -- end eof
	gets#  3 ^GET
	== three hundred hits at once
	reply  200 Cache-Control: max-age=99 | one\l
	ask    /1 = 200
	client send \{300:GET http://%O/1 HTTP/1.1\nHost: %O\n\n} ; shut ; eof
	sees#  301 ^one
	gets#  1 ^GET
	log#   300 hit=fresh
END
}

# Two GETs of one URL; the origin is asked once, the second one is a hit:
# keeps WHAT STATUS 'response fields\n' ['request fields\n']
keeps() {
	play -n "$1: is stored" <<END
	replies $2\n$3 | ok\l
	ask    / ${4-} = $2 | ok\l
	ask    / ${4-} = $2 | ok\l
	sees#  1 ^Age: [0-9]+$
	gets#  1 ^GET /
	log    miss=stored .* server=%O end=done$
	log    hit=fresh .* server=- end=done$
END
}

test_cache_stored() { # what may be stored is (RFC 9111 section 3)
	start_cache
	keeps max-age '200 OK' 'Cache-Control: max-age=99\n'
	keeps 's-maxage over max-age' '200 OK' 'Cache-Control: max-age=0, s-maxage=99\n'
	keeps Expires '200 OK' 'Expires: Fri, 01 Jan 2100 00:00:00 GMT\n'
	keeps heuristics '200 OK' 'Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT\n'
	keeps 'a 302 with max-age' '302 Found' 'Location: /x\nCache-Control: max-age=99\n'
	keeps 'Authorization with public' '200 OK' \
	    'Cache-Control: public, max-age=99\n' 'Authorization: Basic eDp5\n'
	served
}

# Two GETs of one URL, the second one without the request fields; the origin is
# asked for both, and nothing is stored (again: of the first one); log and trace
# tell why: keeps_not WHY STATUS 'response fields\n' ['request fields\n' [again]]
keeps_not() {
	play -n "$1, $2, $3${4-}: is not stored" <<END
	replies $2\n$3 | ok\l
	ask    / ${4-} = $2; fwd= | ok\l
	ask    / = $2; fwd= | ok\l
	gets#  2 ^GET /
	gets!~ ^If-
	log!   hit=
	log    miss=$1 up=
	err~   ^#[0-9]+ . [0-9]+ ms not stored: $1$
END
	[ -n "${5-}" ] || ! grep -r "http://$origin/" "$T/cache" > /dev/null ||
		fail "$1: there is an entry"
}

test_cache_not_stored() { # what must not be stored is not, and why is told
	start_cache -v
	old='Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT\n'
	fresh='Cache-Control: max-age=99\n'
	keeps_not no-store '200 OK' "${fresh}Cache-Control: no-store\n"
	keeps_not no-store '200 OK' "$fresh" 'Cache-Control: no-store\n' again
	keeps_not private '200 OK' 'Cache-Control: private, max-age=99\n'
	keeps_not status '500 No' "$old"
	for vary in '*' 'Accept Cookie' 'a,b,c,d,e,f,g,h,i,j,k,l,m,n,o,p,q'; do
		keeps_not 'vary-[*]' '200 OK' "${fresh}Vary: $vary\n"
	done
	keeps_not set-cookie '200 OK' "${old}Set-Cookie: a=b\n"
	keeps_not authorization '200 OK' "$fresh" 'Authorization: Basic eDp5\n' again
	keeps_not no-lifetime '200 OK' 'X-A: b\n'
	served
}

# A client in the background that gets URL-PATH and BYTES of the pattern, and
# tells when it has sent its request (NAME.sent), has a head (NAME.head) and
# the first 1000 bytes (NAME.some): getter NAME PATH BYTES ['fields\n']
# An HTTP/1.0 client: what ends in the middle is an error there too.
getter() {
	client_bg "$1" <<END
send GET http://%O$2 HTTP/1.0\n${4-}\n
touch $1.sent ; until \n\n ; touch $1.head ; skip 1000
touch $1.some
skip $(($3 - 1000))
eof
END
}

test_cache_not_stored_why() { # other reasons not to store, in log and trace
	start_cache -s 1M -v -e 'nocache url /private' -e 'nocache type text/odd'
	play 'HEAD, a part, a 304, by a rule, too large, cut' <<'END'
	reply  200 Cache-Control: max-age=99\nContent-Length: 4
	reply  206 Cache-Control: max-age=99\nVary: a\nContent-Range: bytes 1-2/10 | bc
	reply  304 ETag: "a"
	reply  200 Cache-Control: max-age=99 | one\l
	reply  200 Cache-Control: max-age=99\nContent-Type: text/odd | one\l
	reply  200 Cache-Control: max-age=99 | \{300000:x}
	reply  200 Cache-Control: max-age=99\nTransfer-Encoding: chunked | 493E0\n\{300000:x}\n0\n\n
	reply  200 Cache-Control: max-age=99\nContent-Length: 9 | one
	ask    HEAD /
	ask    / Range: bytes=1-2
	ask    / If-None-Match: "a"
	ask    /private
	ask    /odd
	ask    /large
	ask    /larger
	ask    /cut
	sees   -- end eof answer
	err~   not stored: method$
	err~   not stored: range$
	err~   not stored: status$
	err~   not stored: rule$
	err~   not stored: rule$
	err~   not stored: too-large$
	log    "HEAD [^"]*" 200 0 .* miss=method
	log    206 2 .* miss=range
	log    304 0 .* miss=status
	log    /private .* miss=rule
	log    /odd .* miss=rule
	log    /large .* 200 300000 .* miss=too-large
	log    /larger .* 200 300000 .* miss=too-large
	log    /cut .* miss=incomplete .* end=server
END
	nothing_stored
	play 'a POST in the meantime' <<'END'
	reply  200 Cache-Control: max-age=99\nContent-Length: 2000
	origin fill 1000 ; await more ; fill 1000
	origin next
	reply  200 |
	do getter a /x 2000
	do comes a.some
	b: ask POST /x Content-Length: 0
	b: ends .
	do touch more
	do ends a ^eof$
	log    "GET [^"]*/x HTTP/1.0" 200 2000 .* miss=outdated .* end=done
END
	nothing_stored
	for fields in '' 'Cache-Control: no-cache\n' 'If-None-Match: "z"\n' \
	    'Authorization: Basic eDp5\n'; do
		rm -f asked go
		play "a POST before the head, $fields" <<END
	origin head ; touch asked ; await go
	origin say 200 Connection: close\nCache-Control: public, max-age=99 | old\l
	origin next
	reply  200 Connection: close |
	reply  200 Connection: close\nCache-Control: max-age=0 | new\l
	a: ask /x $fields = 200 | old\l
	do comes asked
	b: ask POST /x Content-Length: 0
	b: ends .
	do touch go
	a: ends .
	c: ask /x = 200; fwd=uri-miss | new\l
	c: ends .
	log    "GET [^"]*" 200 4 .* miss=outdated
END
	done
	nothing_stored
}

test_cache_methods() { # POST, TRACE, OPTIONS, unknown: never from the cache
	start_cache
	for method in POST PUT OPTIONS TRACE PATCH FOO get; do
		play -n "$method" <<END
	reply  200 Connection: close\nCache-Control: max-age=99 | ok\l
	ask    $method / = 200; fwd=
	ask    $method / = 200; fwd=
	ask    / = 200; fwd=
	gets#  2 ^$method / HTTP
	gets#  1 ^GET / HTTP
	log!   hit=
END
	done
	play 'POST to a URL without a path' <<'END'
	reply  200 Cache-Control: max-age=99 | mine
	reply  200 Cache-Control: max-age=99 | all
	ask    POST http://%O | x = 200 | mine
	ask    / = 200 | all
	== CONNECT
	reply  200 Cache-Control: max-age=99 | ok\l
	reply  200 Cache-Control: max-age=99 | no\l
	ask    CONNECT %O = 200
	ask    / = 200 | ok\l
	ask    / = 200 | no\l
	client shut ; eof
	sees!~ ^(Cache-Status|Age)
	gets#  2 ^GET http
	log    "CONNECT %O HTTP/1.1" 200 [0-9]+ "-" "-" up=
END
}

test_cache_validate() { # stale entries are validated (RFC 9111 section 4.3)
	start_cache
	play 'ETag: 304 freshens and merges, then a hit' <<'END'
	reply  200 Cache-Control: max-age=60\nAge: 100\nETag: "a"\nX-Old: 1\nX-Both: old\nContent-Type: text/x | one\l
	reply  304 Cache-Control: max-age=999\nETag: "a"\nX-Both: new\nX-New: 2\nContent-Length: 77
	ask    / = 200 | one\l
	ask    / = 200 OK
	sees   X-Old: 1
	sees~  ^Cache-Status: proxy-ID; .*fwd=stale; fwd-status=304
	sees   one\l
	ask    / = 200 OK; hit | one\l
	sees#  3 ^X-Old: 1
	sees#  1 ^X-Both: old
	sees#  2 ^X-Both: new
	sees#  2 ^X-New: 2
	sees#  2 ^Cache-Control: max-age=999
	sees#  3 ^Content-Length: 4
	sees#  3 ^Content-Type: text/x
	gets   If-None-Match: "a"
	gets#  2 ^GET
	log    200 4 .* miss=stored
	log    200 4 .* hit=validated
	log    200 4 .* hit=fresh
	== Last-Modified: If-Modified-Since; a 200 replaces
	reply  200 Cache-Control: max-age=0\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT | one\l
	reply  200 Cache-Control: max-age=99 | two\l
	ask    / = 200 | one\l
	ask    / = 200 OK; fwd=stale; fwd-status=200; stored | two\l
	ask    / = 200 | two\l
	sees#  1 ^Last-Modified
	gets   If-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT
	gets#  2 ^GET
	log    miss=stored
	log    miss=stored
	log    hit=fresh
	== a 304 without Date was made now; a cookie that it sets is not stored
	reply  200 Date: Sun, 06 Nov 1994 08:49:37 GMT\nCache-Control: max-age=60\nETag: "a"\nAge: 100 | one\l
	reply  304 Cache-Control: max-age=999\nETag: "a"\nSet-Cookie: a=b
	ask    / = 200 | one\l
	ask    / = 200 | one\l
	ask    / = 200 | one\l
	sees#  1 ^Set-Cookie
	sees#  3 ^Date: 
	sees#  1 ^Date: Sun, 06 Nov 1994
	sees#  2 ^Age: [01]$
	log    miss=stored
	log    hit=validated
	log    hit=fresh
	== nor one of the entry, once it is not for all
	reply  200 Connection: close\nCache-Control: public, max-age=60\nETag: "a"\nAge: 100\nSet-Cookie: a=b | one\l
	reply  304 Connection: close\nCache-Control: max-age=999\nETag: "a"
	reply  200 Connection: close | two\l
	ask    / = 200 | one\l
	ask    / = 200 | one\l
	ask    / = 200 | two\l
	== response no-cache is validated each time
	reply  200 Connection: close\nCache-Control: no-cache, max-age=99\nETag: W/"a" | one\l
	reply  304 Connection: close\nETag: W/"a"
	ask    / = 200 | one\l
	ask    / = 200 | one\l
	ask    / = 200 | one\l
	gets#  2 ^If-None-Match: W/"a"
	log    miss=stored
	log    hit=validated
	log    hit=validated
	== a 304 with large new fields: answered right, then and later
	reply  200 Cache-Control: max-age=0\nETag: "a" | one\l
	reply  304 Connection: close\nCache-Control: max-age=99\nETag: "a"\nX-Long: \{12000:x}
	reply  200 Cache-Control: max-age=99\nETag: "b" | one\l
	ask    / = 200 | one\l
	ask    / = 200 | one\l
	ask    / = 200 | one\l
	sees   -- end open
	== a full answer that may not be stored ends the entry
	reply  200 Cache-Control: max-age=0\nETag: "a" | one\l
	reply  200 Cache-Control: no-store | two\l
	ask    / = 200 | one\l
	ask    / = 200 | two\l
	ask    / Cache-Control: max-stale, only-if-cached = 504
	gets#  2 ^GET
	== an error that is about the request, not its target, does not
	reply  200 Cache-Control: max-age=0\nETag: "a" | one\l
	reply  429 Cache-Control: no-store | no\l
	ask    / = 200 | one\l
	ask    / = 429 | no\l
	ask    / Cache-Control: max-stale, only-if-cached = 200 | one\l
	gets#  2 ^GET
END
}

# The steps "ask / FIELDS = STATUS", for a hit, of rows "STATUS|FIELDS".
hits_of() {
	while IFS='|' read -r want fields; do
		printf '%s\n' "ask / $fields = $want" \
		    "log \" $want [0-9]+ .* hit=fresh"
		[ "$want" != 200 ] || [ -z "${1-}" ] || printf 'sees %s\n' "$1"
	done
}

test_cache_conditions() { # the client's conditions, answered from the entry
	start_cache
	hits_of 'one\l' > asks <<'END'
304|If-None-Match: "a"
304|If-None-Match: W/"a"
304|If-None-Match: "b,", "a"
304|If-None-Match: "b"\nIf-None-Match: "a"
304|If-None-Match: *
200|If-None-Match: "b"
200|If-None-Match: a
200|If-None-Match: "A"
304|If-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT
304|If-Modified-Since: Sunday, 06-Nov-94 08:49:38 GMT
304|If-Modified-Since: Sun Nov  6 08:49:37 1994
200|If-Modified-Since: Sun, 06 Nov 1994 08:49:36 GMT
200|If-Modified-Since: Sun, 06 Nov 1994 08:49:37 CET
200|If-Modified-Since: yesterday
200|If-None-Match: "b"\nIf-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT
304|If-None-Match: "a"\nIf-Modified-Since: Sun, 06 Nov 1993 08:49:37 GMT
END
	play 'If-None-Match, If-Modified-Since' <<END
	reply  200 Cache-Control: max-age=999\nETag: "a"\nX-A: b\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT | one\l
	ask    / = 200 OK
	$(cat asks)
	sees   -- end open
	sees#  17 ^ETag: "a"
	sees#  8 ^one
	gets#  1 ^GET
	== on a miss they go to the origin, and its 304 to the client
	reply  304 Cache-Control: max-age=99\nETag: "a"
	reply  200 Cache-Control: max-age=99\nETag: "a" | one\l
	ask    / If-None-Match: "a" = 304
	ask    / = 200 OK | one\l
	gets   If-None-Match: "a"
	gets#  2 ^GET
	gets#  1 ^If-None-Match
	== the 304 says no more about the body; and what is stored is not changed
	reply  200 Cache-Control: max-age=99\nETag: "a"\nContent-Type: a/b\nContent-Encoding: c\nContent-Location: /d | one\l
	ask    / = 200 OK | one\l
	ask    / If-None-Match: "a" = 304; hit
	ask    / = 200; hit | one\l
	sees#  2 ^Content-Type: a/b$
	sees#  2 ^Content-Encoding
	sees#  3 ^Content-Location
	== so for every status of success, and for no other
	reply  206 ETag: "a"\nCache-Control: max-age=99\nContent-Range: bytes 0-2/9 | one
	reply  203 ETag: "a"\nCache-Control: max-age=99 | two
	reply  404 ETag: "a"\nCache-Control: max-age=99 | none
	ask    /p Range: bytes=0-2 = 206 | one
	ask    /p Range: bytes=0-2\nIf-None-Match: "a" = 304; hit
	ask    /p Range: bytes=0-2\nIf-None-Match: "b" = 206; hit | one
	ask    /q = 203 | two
	ask    /q If-None-Match: "a" = 304; hit
	ask    /r = 404 | none
	ask    /r If-None-Match: "a" = 404; hit | none
	== on a stale entry the client with another one gets the whole
	reply  200 Connection: close\nCache-Control: max-age=0\nETag: "a" | one\l
	reply  304 Connection: close\nCache-Control: max-age=0\nETag: "a"
	ask    / = 200 | one\l
	ask    / If-None-Match: "b" = 200 OK | one\l
	ask    / If-None-Match: "a" = 304
	sees   -- end open
	gets~  ^If-None-Match: .*"a"
	gets~  ^If-None-Match: .*"a"
END
}

test_cache_guards() { # If-Match and If-Unmodified-Since: the server alone says that they fail
	start_cache
	date='Sun, 06 Nov 1994 08:49'
	hits_of > asks <<END
200|If-Match: "a"
200|If-Match: "b", "a"
200|If-Match: "b"\nIf-Match: "a"
200|If-Match: *
200|If-Unmodified-Since: $date:37 GMT
200|If-Unmodified-Since: $date:38 GMT
200|If-Unmodified-Since: yesterday
200|If-Match: "a"\nIf-Unmodified-Since: $date:36 GMT
304|If-Match: "a"\nIf-None-Match: "a"
206|If-Match: "a"\nRange: bytes=1-2
416|If-Match: "a"\nRange: bytes=9-
END
	while read -r fields; do
		printf '%s\n' 'reply 412 No | no!\l' "ask / $fields = 412 No" \
		    "gets ${fields%%\\n*}" 'log " 412 4 .* miss='
	done > asks.not <<END
If-Match: "b"
If-Match: W/"a"
If-Match: "A"
If-Match: a
If-Unmodified-Since: $date:36 GMT
If-Match: "b"\nIf-Unmodified-Since: $date:38 GMT
If-Match: "b"\nIf-None-Match: "a"
If-Match: "b"\nRange: bytes=1-2
If-Match: "b"\nRange: bytes=9-
END
	play 'on what is fresh' <<END
	reply  200 Cache-Control: max-age=999\nETag: "a"\nLast-Modified: $date:37 GMT | one\l
	ask    / = 200
	$(cat asks)
	sees   -- end open
	sees#  11 ^Cache-Status: proxy-ID; hit; ttl=
	gets#  1 ^GET
	== what it does not meet goes to the server, and the entry stays
	reply  200 Cache-Control: max-age=999\nETag: "a"\nLast-Modified: $date:37 GMT | one\l
	ask    / = 200
	$(cat asks.not)
	ask    / = 200; hit | one\l
	reply  200 new
	ask    HEAD / If-Match: "b" = 200 new
	gets#  1 ^HEAD
	== on what has no validator
	reply  404 No\nCache-Control: max-age=999 | off\l
	reply  200 Cache-Control: max-age=999 | one\l
	reply  412 No
	ask    /none = 404
	ask    /none If-Match: * = 404
	ask    / = 200
	ask    / If-Unmodified-Since: Sun, 06 Nov 1994 08:49:37 GMT = 200
	ask    / If-Match: "a" = 412 No
	gets#  3 ^GET
	== on what is stale they go to the server, with the range
	reply  200 Connection: close\nAge: 100\nETag: "a"\nCache-Control: max-age=60 | abcdefghij
	reply  412 No\nConnection: close | no!\l
	reply  206 Connection: close\nETag: "a"\nCache-Control: max-age=99\nContent-Range: bytes 5-9/10 | fghij
	reply  304 Connection: close\nETag: "a"\nCache-Control: max-age=99
	reply  200 Connection: close\nETag: "b"\nCache-Control: max-age=99 | new\l
	ask    / = 200 | abcdefghij
	ask    / If-Match: "a"\nRange: bytes=5- = 412 No
	ask    / If-Unmodified-Since: Sun, 06 Nov 1994 08:49:37 GMT\nRange: bytes=5- = 206 | fghij
	ask    / = 200 | abcdefghij
	ask    / Cache-Control: no-cache\nIf-Match: "b" = 200 | new\l
	ask    / = 200 | new\l
	sees   -- end open
	gets   -- connection 2
	gets   If-Match: "a"
	gets   Range: bytes=5-
	gets   -- connection 3
	gets   If-Unmodified-Since: Sun, 06 Nov 1994 08:49:37 GMT
	gets   Range: bytes=5-
	gets   -- connection 4
	gets   If-None-Match: "a"
	gets   -- connection 5
	gets   If-Match: "b"
	gets#  1 ^If-None-Match
	log    412 4 .* miss=
	log    206 5 .* miss=
	log    200 10 .* hit=validated
	== the whole that answers a range takes its place
	reply  200 Connection: close\nAge: 100\nETag: "a"\nCache-Control: max-age=60 | abcdefghij
	reply  200 Connection: close\nETag: "b"\nCache-Control: max-age=99 | new\l
	ask    / = 200 | abcdefghij
	ask    / If-Match: "b"\nRange: bytes=5- = 200 | new\l
	ask    / = 200; hit | new\l
	log    200 10 .* miss=stored
	log    200 4 .* miss=stored
END
}

# One entry, then one request that the entry answers (hit), that the origin
# is asked for (ask), or 504: wishes WANT 'response fields' 'request fields'
wishes() {
	case $1 in
	ask) wishes_see='200 | two\l' wishes_n=2 wishes_log='miss=|hit=validated' ;;
	504) wishes_see='504 Gateway Timeout' wishes_n=1 wishes_log='" 504 ' ;;
	*) wishes_see='200 | one\l' wishes_n=1 wishes_log=hit=$1 ;;
	esac
	play -n "$2 with $3: $1" <<END
	reply  200 Age: 100\nETag: "a"\n$2 | one\l
	reply  200 $2 | two\l
	ask    / = 200 | one\l
	ask    / $3 = $wishes_see
	gets#  $wishes_n ^GET
	log    miss=stored
	log    $wishes_log
END
}

test_cache_wishes() { # Cache-Control of requests (RFC 9111 section 5.2.1)
	start_cache
	fresh='Cache-Control: max-age=1000\n'
	stale='Cache-Control: max-age=60\n'
	wishes fresh "$fresh" ''
	wishes ask "$fresh" 'Cache-Control: no-cache\n'
	wishes ask "$fresh" 'Pragma: no-cache\n'
	wishes ask "$fresh" 'Cache-Control: max-age=50\n'
	play 'max-age=0 on what has come in the same second' <<'END'
	reply  200 ETag: "a"\nCache-Control: max-age=60 | one\l
	reply  200 | two\l
	ask    / = 200
	ask    / Cache-Control: max-age=0 = 200 | two\l
	gets#  1 ^If-None-Match: "a"
END
	wishes ask "$fresh" 'Cache-Control: min-fresh=950\n'
	wishes fresh "$fresh" 'Cache-Control: only-if-cached\n'
	wishes ask "$stale" ''
	wishes stale "$stale" 'Cache-Control: max-stale\n'
	wishes stale "$stale" 'Cache-Control: max-stale, only-if-cached\n'
	wishes 504 "$stale" 'Cache-Control: only-if-cached\n'
	wishes ask 'Cache-Control: max-age=60, must-revalidate\n' \
	    'Cache-Control: max-stale\n'
	play 'only-if-cached, nothing there' <<'END'
	ask    http://127.0.0.1:9/none Cache-Control: only-if-cached = 504 Gateway Timeout
	sees~  ^504 
	log    504 .* server=- end=done why="
	== only-if-cached of a request that no entry can answer
	ask    POST http://127.0.0.1:9/none Cache-Control: only-if-cached | x = 504 Gateway Timeout
	log    504 .* server=- end=done why="
END
}

test_cache_age() { # a second later it is a second older; then stale; stale-while-revalidate: at once, and refreshed
	start_cache
	play -n 'max-age=1' <<'END'
	reply  200 Cache-Control: max-age=1 | one\l
	reply  200 Age: 50\nCache-Control: max-age=99 | two\l
	ask    / = 200 | one\l
	client stall 2100
	ask    / = 200 | two\l
	ask    / = 200
	sees~  ^Age: 5[0-9]$
	sees   two\l
	gets#  2 ^GET
	log    miss=stored
	log    miss=stored
	log    hit=fresh
	== an old Date counts as age
	replies 200 Date: Sun, 06 Nov 1994 08:49:37 GMT\nETag: "a"\nCache-Control: max-age=99 | one\l
	ask    / = 200
	ask    / = 200
	gets#  2 ^GET
	log!   hit=fresh
	== a wrong Age does not count
	reply  200 Age: -99\nCache-Control: max-age=99 | one\l
	ask    / = 200 | one\l
	ask    / = 200
	sees#  1 ^Age: [0-9]$
	gets#  1 ^GET
END
	play -n 'what says no lifetime is stale for as long as it is old' <<'END'
	reply  200 Age: 100\nETag: "a" | one\l
	a: ask / = 200
	a: ask / Cache-Control: max-stale = 200; hit; ttl=-10 | one\l
	a: ends .
	do age=$(tr -d '\r' < a | sed -n 's/^Age: //p' | tail -n 1)
	do tr -d '\r' < a | grep "ttl=-$age\$" > ttl || fail "ttl is not -$age"
	== stale, and then refreshed
	reply  200 Connection: close\nAge: 100\nETag: "a"\nCache-Control: max-age=60, stale-while-revalidate=999 | one\l
	origin next
	origin head ; await go
	origin say 200 Connection: close\nCache-Control: max-age=999 | two\l
	a: ask / = 200 | one\l
	a: ask / = 200; hit | one\l
	a: sees+ -- end open
	a: ends .
	do reached 2
	do touch go
	do wait_for 10 'grep -r -l "^two" cache' || fail "it is not refreshed"
	b: ask / = 200; hit | two\l
	gets#  2 ^GET /
	gets#  1 ^If-None-Match: "a"
	== not beyond its time
	reply  200 Age: 100\nETag: "a"\nCache-Control: max-age=60, stale-while-revalidate=9 | one\l
	reply  200 | two\l
	ask    / = 200 | one\l
	ask    / = 200 | two\l
END
}

# Waits until the origin has been asked N times: reached N
reached() {
	wait_for 15 "[ -s $origin_name.$1 ]" ||
		fail "${what-}: request $1 does not reach the origin"
}

# A stale entry, then an origin that fails: by the answer of a status, or by
# closing without one.  The client gets the entry (one) or an error:
# failing WANT 'Cache-Control of the response' 'request fields' STEP
failing() {
	play -n "$2, $3: $4" <<END
	reply  200 Connection: close\nAge: 100\nETag: "a"\nCache-Control: max-age=60$2 | one\l
	origin next
	origin head ; $4
	ask    / = 200 | one\l
	ask    / $3 = $1
	gets   -- connection 2
	log    miss=stored
	log    " $1 [0-9]+
END
}

test_cache_stale_error() { # a server that fails, or is gone: stale where allowed
	start_cache
	no='say 503 No\nConnection: close | no\l'
	failing 200 ', stale-if-error=999' '' "$no"
	failing 200 '' 'Cache-Control: stale-if-error=999\n' "$no"
	failing 503 '' '' "$no"
	failing 404 ', stale-if-error=999' '' 'say 404 No\nConnection: close | no\l'
	failing 200 '' '' close
	failing 200 '' '' reset
	failing '50[24]' ', must-revalidate' '' close
	failing '50[24]' '' 'Cache-Control: no-cache\n' close
	failing 200 ', stale-if-error=999' '' 'send nonsense\n\n'
	failing 200 ', stale-if-error=999' '' 'send HTTP/1.1 200 OK\nX- ; close'
	failing 200 ', stale-if-error=999' '' 'send HTTP/1.1 407 No\n\n'
	failing '50[24]' ', must-revalidate' '' 'send HTTP/1.1 200 OK\nX- ; close'
	play 'a server that is gone' <<'END'
	reply  200 Connection: close\nAge: 100\nCache-Control: max-age=60\nETag: "a" | one\l
	a: ask /gone = 200
	a: ends .
	do ended $origin_name.1
	do kill "${origin_says#* }"
	# The port may take a moment to close.
	do "$peer" sleep 200
	b: ask /gone = 200 OK
	b: sees~ ^Age: 10[0-9]
	b: sees one\l
	b: ask /other
	b: sees+~ ^HTTP/1.1 502
	log    /gone HTTP/1.1" 200 4 .* hit=stale .* end=done$
	log    /other HTTP/1.1" 502
END
	stop_proxy
	origin p <<'END'
reply 200 Connection: close\nAge: 100\nETag: "a"\nCache-Control: max-age=60 | one\l
---
reply 407 No\nConnection: close |
END
	start_cache -x "http://me:x@$origin"
	play -n 'a parent that takes the login no more' <<'END'
	ask    http://a.example/ = 200 | one\l
	ask    http://a.example/ = 200; fwd=stale; ttl=-4 | one\l
END
}

test_cache_vary() { # variants of a URL side by side (RFC 9111 section 4.1); one that somebody put at the place of its marker answers nobody
	start_cache
	play 'two fields, four variants, each a hit afterwards' <<'END'
	reply  200 Vary: Accept-Language, X-B\nCache-Control: max-age=99 | en1\l
	reply  200 Vary: Accept-Language, X-B\nCache-Control: max-age=99 | de1\l
	reply  200 Vary: Accept-Language, X-B\nCache-Control: max-age=99 | de2\l
	reply  200 Vary: Accept-Language, X-B\nCache-Control: max-age=99 | no2\l
	ask    / Accept-Language: en\nX-B: 1 = 200; fwd=uri-miss; fwd-status=200; stored$ | en1\l
	ask    / Accept-Language: de\nX-B: 1 = 200; fwd=vary-miss; fwd-status=200; stored$ | de1\l
	ask    / Accept-Language: de\nX-B: 2 = 200 | de2\l
	ask    / X-B: 2 = 200 | no2\l
	ask    / Accept-Language: en\nX-B: 1 = 200; hit | en1\l
	ask    / x-b: 1\nX-C: d\naccept-language: de = 200; hit | de1\l
	ask    / Accept-Language: de\nX-B: 2 = 200; hit | de2\l
	ask    / X-B: 2 = 200; hit | no2\l
	gets#  4 ^GET
	log#   4 hit=fresh
	== blanks in lists and lines of a field are no difference
	reply  200 Vary: Accept-Encoding\nCache-Control: max-age=99 | one\l
	ask    / Accept-Encoding: gzip, br = 200 | one\l
	ask    / Accept-Encoding: gzip,br = 200 | one\l
	ask    / Accept-Encoding: gzip\nAccept-Encoding: \t br\s = 200 | one\l
	gets#  1 ^GET
	log#   2 hit=fresh
	== values are not mixed up
	reply  200 Connection: close\nVary: X-A, X-B\nCache-Control: max-age=99 | ok\l
	ask    / X-A: 1\nX-B: 2 = 200 | ok\l
	ask    / X-A: 2\nX-B: 1 = 200 | ok\l
	ask    / X-A: 1;x-b=2 = 200 | ok\l
	ask    / X-A: 1\nX-B: 2;x-b= = 200 | ok\l
	ask    / X-A: 1;x-b=2;x-b= = 200 | ok\l
	ask    / X-A: A\nX-B: 2 = 200 | ok\l
	ask    / X-A: a\nX-B: 2 = 200 | ok\l
	ask    / X-A: "1,2" = 200 | ok\l
	ask    / X-A: "1, 2" = 200 | ok\l
	gets#  9 ^GET
	log!   hit=
	== a stale variant is validated with its own ETag
	reply  200 Connection: close\nVary: X-A\nETag: "1"\nCache-Control: max-age=0 | one\l
	reply  200 Connection: close\nVary: X-A\nETag: "2"\nCache-Control: max-age=0 | two\l
	reply  304 Connection: close\nVary: X-A\nETag: "1"\nCache-Control: max-age=99
	ask    / X-A: 1 = 200 | one\l
	ask    / X-A: 2 = 200 | two\l
	ask    / X-A: 1 = 200 | one\l
	ask    / X-A: 1 = 200 | one\l
	gets   -- connection 3
	gets~  ^If-None-Match: .*"1"
	gets#  3 ^GET
	log    hit=validated
	log    hit=fresh
	== a 304 with another Vary: what it leaves is no answer for others
	reply  200 Connection: close\nCache-Control: max-age=0\nETag: "a" | one
	reply  304 Connection: close\nCache-Control: max-age=999\nETag: "a"\nVary: X-A
	reply  200 Connection: close\nCache-Control: max-age=999\nETag: "b"\nVary: X-A | two
	ask    / X-A: 1 = 200 | one
	ask    / X-A: 1 = 200; fwd=stale; fwd-status=304 | one
	ask    / X-A: 2 = 200 | two
	gets   -- connection 2
	gets   If-None-Match: "a"
	gets   -- connection 3
	gets   X-A: 2
	== a variant that somebody put at the place of its marker answers nobody
	reply  200 Connection: close\nVary: X-M\nCache-Control: max-age=99 | one\l
	reply  200 Connection: close\nVary: X-M\nCache-Control: max-age=99 | two\l
	a: ask / X-M: 1 = 200 | one\l
	a: ends .
	do cp "$(grep -r -l '^variant: x-m' cache)" "$(grep -r -l '^vary: x-m' cache)"
	b: ask / X-M: 2 = 200; fwd= | two\l
	b: ask / X-M: 2 = 200; hit | two\l
	b: ends .
END
}

test_cache_vary_forms() { # Vary in another form is the same Vary; values that may mean different things are different
	start_cache
	for form in 'Vary: x-a,X-B\n' 'Vary: X-A\nVary: X-B\n' 'Vary: ,X-A ,, X-B\n' \
	    'Vary: X-B, X-A\n' 'Vary: X-A, X-B, X-A\n'; do
		play -n "$form" <<END
	reply  200 Vary: X-A, X-B\nCache-Control: max-age=99 | one\l
	reply  200 ${form}Cache-Control: max-age=99 | two\l
	ask    / X-A: 1\nX-B: 2 = 200 | one\l
	ask    / X-A: 2\nX-B: 1 = 200 | two\l
	ask    / X-A: 1\nX-B: 2 = 200 | one\l
	ask    / X-A: 2\nX-B: 1 = 200 | two\l
	gets#  2 ^GET
END
	done
	for pair in 'Accept|application/x;profile="A"|application/x;profile="a"' \
	    'Accept-Profile|Tenant|tenant' 'User-Agent|x (K,y)|x (K, y)' \
	    'TE|trailers|gzip'; do
		field=${pair%%|*}
		pair=${pair#*|}
		play "$field" <<END
		reply  200 Vary: $field\nCache-Control: max-age=9 | one
		reply  200 Vary: $field\nCache-Control: max-age=9 | two
		ask    / $field: ${pair%|*} = 200 | one
		ask    / $field: ${pair#*|} = 200 | two
		ask    / $field: ${pair%|*} = 200; hit | one
END
	done
}

# One range of a stored body of ten bytes:
# ranges STATUS 'Content-Range' BODY 'request fields'
ranges() {
	ranges_n=1
	[ -n "$2" ] || ranges_n=0
	play -n "$4" <<END
	reply  200 ETag: "a"\nCache-Control: max-age=99\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT | abcdefghij
	ask    / = 200 | abcdefghij
	ask    / $4 = $1 
	${2:+sees   Content-Range: $2}
	sees   Content-Length: ${#3}
	${3:+sees $3}
	ask    / = 200 OK | abcdefghij
	sees+  -- end open
	sees#  $ranges_n ^Content-Range
	gets#  1 ^GET
	log    miss=stored
	log    " $1 ${#3} .* hit=fresh
	log    hit=fresh
END
}

test_cache_range() { # ranges of what is stored whole (RFC 9110 section 14)
	start_cache
	ranges 206 'bytes 2-4/10' cde 'Range: bytes=2-4\n'
	ranges 206 'bytes 7-9/10' hij 'Range: bytes=-3\n'
	ranges 206 'bytes 7-9/10' hij 'Range: bytes=7-999\nIf-Range: "a"\n'
	ranges 206 'bytes 7-9/10' hij 'Range: bytes=7-\nIf-Range: Sun, 06 Nov 1994 08:49:37 GMT\n'
	ranges 416 'bytes */10' '' 'Range: bytes=10-\n'
	ranges 200 '' abcdefghij 'Range: bytes=7-\nIf-Range: "b"\n'
	ranges 200 '' abcdefghij 'Range: bytes=7-\nIf-Range: W/"a"\n'
	ranges 200 '' abcdefghij 'Range: bytes=10-\nIf-Range: "b"\n'
	ranges 200 '' abcdefghij 'Range: bytes=7-\nIf-Range: Sun, 06 Nov 1994 08:49:38 GMT\n'
	ranges 200 '' abcdefghij 'Range: lines=1-2\n'
	same=$(date -u '+%a, %d %b %Y %H:%M:%S GMT')
	play 'If-Range: a date that is no strong validator joins no parts' <<END
	reply  200 Cache-Control: max-age=999\nLast-Modified: $same\nDate: $same | abcdefghij
	ask    / = 200 | abcdefghij
	ask    / Range: bytes=2-4\nIf-Range: $same = 200 | abcdefghij
	gets#  1 ^GET
END
	sed 's/ /|Range: bytes=/' <<'END' | hits_of > asks
200 -5
200 0-
416 -0
416 0-0
416 1-
END
	play 'of an empty body' <<END
	reply  200 Cache-Control: max-age=999 |
	ask    / = 200
	$(cat asks)
	sees   -- end open
	sees#  3 ^HTTP/1.1 200 OK
	sees#  3 ^Content-Range: bytes ./0
	sees#  6 ^Content-Length: 0
	gets#  1 ^GET
	log!   " [0-9]+ [1-9][0-9]* .* hit=
	== a Content-Range that says nothing is not passed on beside ours
	reply  200 Cache-Control: max-age=999\nContent-Range: bytes 0-9/10 | abcdefghij
	ask    / = 200 | abcdefghij
	ask    / Range: bytes=2-4 = 206 | cde
	sees#  2 ^Content-Range
	sees#  1 ^Content-Range: bytes 2-4/10
END
}

test_cache_range_miss() { # a part from the server never passes for the whole
	start_cache
	play 'a range on a miss is passed on; the whole is asked for' <<'END'
	reply  206 Connection: close\nETag: "a"\nCache-Control: max-age=99\nContent-Range: bytes 2-4/10 | cde
	reply  206 Connection: close\nETag: "a"\nCache-Control: max-age=99\nContent-Range: bytes 5-6/10 | fg
	reply  200 Connection: close\nETag: "a"\nCache-Control: max-age=99 | abcdefghij
	ask    / Range: bytes=2-4 = 206
	sees   Content-Range: bytes 2-4/10
	sees   cde
	ask    / Range: bytes=5-6 = 206
	sees   Content-Range: bytes 5-6/10
	sees   fg
	ask    / = 200 | abcdefghij
	ask    / = 200 | abcdefghij
	gets   Range: bytes=2-4
	gets   Range: bytes=5-6
	gets#  3 ^GET
	gets#  2 ^Range
	log    206 3
	log    206 2
	log    200 10 .* miss=stored
	log    200 10 .* hit=fresh
	== a 200 to a range is stored whole
	reply  200 Cache-Control: max-age=99\nETag: "a" | abcdefghij
	ask    / Range: bytes=2-4 = 200
	sees   Content-Length: 10
	sees   abcdefghij
	ask    / = 200 | abcdefghij
	ask    / Range: bytes=2-4 = 206 | cde
	gets#  1 ^GET
	== a 206 that was not asked for is not stored
	reply  206 Connection: close\nCache-Control: max-age=99\nContent-Range: bytes 2-4/10 | cde
	ask    /
	ask    /
	gets#  2 ^GET
	log!   hit=
	== a part of what is stored whole does not push it out
	reply  200 Connection: close\nCache-Control: max-age=0\nETag: "a" | hello
	reply  206 Connection: close\nCache-Control: max-age=999\nETag: "a"\nContent-Range: bytes 0-1/5 | he
	reply  304 Connection: close\nETag: "a"
	ask    / = 200 | hello
	ask    / Range: bytes=0-1 = 206 Partial Content
	ask    / = 200; fwd=stale; fwd-status=304 | hello
	gets   -- connection 3
	gets   If-None-Match: "a"
	log    200 5 .* miss=stored
	log    206 2
	log    200 5 .* hit=validated
	== nor variants of the whole
	reply  200 Connection: close\nCache-Control: max-age=99\nVary: X-A | hello
	reply  206 Connection: close\nCache-Control: max-age=99\nContent-Range: bytes 0-1/5 | he
	ask    / X-A: 1 = 200 | hello
	ask    / X-A: 2\nRange: bytes=0-1 = 206 | he
	ask    / X-A: 1 = 200; hit | hello
	log    206 2 .* miss=range
	== but a part of a newer version does
	reply  200 Connection: close\nCache-Control: max-age=0\nETag: "a" | hello
	reply  206 Connection: close\nCache-Control: max-age=99\nETag: "b"\nContent-Range: bytes 0-1/5 | HE
	ask    / = 200 | hello
	ask    / Range: bytes=0-1 = 206; fwd=stale | HE
	ask    / Range: bytes=0-1 = 206; hit | HE
END
	play 'nor a whole that came in the meantime' <<'END'
	origin head ; touch asked ; await go
	origin say 206 Connection: close\nCache-Control: max-age=99\nContent-Range: bytes 0-1/5 | he
	origin next
	reply  200 Connection: close\nCache-Control: max-age=99 | hello
	a: ask / Range: bytes=0-1 = 206 | he
	do comes asked
	b: ask / = 200 | hello
	b: ends .
	do touch go
	a: ends .
	c: ask / = 200; hit | hello
	c: ends .
END
}

test_cache_head() { # HEAD is answered from a stored GET, and stored by none
	start_cache
	play 'GET, then HEAD' <<'END'
	reply  200 Cache-Control: max-age=99\nETag: "a"\nX-A: b\nTransfer-Encoding: chunked | 4\none\l\n0\n\n
	ask    / = 200
	sees   one\l
	ask    HEAD / = 200 OK
	sees   X-A: b
	sees   Content-Length: 4
	ask    HEAD / If-None-Match: "a" = 304 Not Modified
	ask    HEAD / Range: bytes=1-2 = 200 OK
	sees   Content-Length: 4
	ask    / = 200 OK | one\l
	sees+  -- end open
	sees#  2 ^one
	gets#  1 / HTTP/1.1
	log    "HEAD http://%O/ HTTP/1.1" 200 0 .* hit=fresh
	log    "HEAD http://%O/ HTTP/1.1" 304 0 .* hit=fresh
	log    "HEAD http://%O/ HTTP/1.1" 200 0 .* hit=fresh
	log    "GET http://%O/ HTTP/1.1" 200 4 .* hit=fresh
	== a HEAD validates the entry of a GET, by 304 or by 200
	reply  200 Cache-Control: max-age=0\nETag: "v"\nContent-Length: 4 | one\l
	reply  304 Cache-Control: max-age=0\nETag: "v"\nX-A: b
	origin head ; say 200 Cache-Control: max-age=99\nETag: "v"\nX-A: c\nContent-Length: 4
	ask    / = 200; fwd=uri-miss
	ask    HEAD / = 200; fwd=stale; fwd-status=304
	ask    HEAD / = 200; fwd=stale; fwd-status=200
	ask    / = 200; hit; ttl=99 | one\l
	sees#  1 ^X-A: b
	sees#  2 ^X-A: c
	gets#  3 / HTTP/1.1
	== HEAD on a miss is no entry for GET
	reply  200 Cache-Control: max-age=99\nContent-Length: 4
	reply  200 Cache-Control: max-age=99 | one\l
	ask    HEAD / = 200
	ask    / = 200 | one\l
	sees#  1 ^one
	gets   HEAD / HTTP/1.1
	gets   GET / HTTP/1.1
	== HEAD that tells of another body ends the entry
	reply  200 Connection: close\nCache-Control: max-age=99\nETag: "a" | one\l
	reply  200 Connection: close\nCache-Control: max-age=99\nETag: "b"\nContent-Length: 5
	reply  200 Connection: close\nCache-Control: max-age=99\nETag: "b" | five\l
	ask    / = 200 | one\l
	ask    HEAD / Cache-Control: no-cache
	sees   ETag: "b"
	ask    /
	sees   ETag: "b"
	sees   five\l
	gets#  2 ^GET
END
}

test_cache_calls() { # a small hit: one read, an open, two reads, a write, a close; a response that is stored: three writes to its file, no more
	need_calls
	start_cache
	play -n 'four hits' <<'END'
	reply  200 Cache-Control: max-age=999 | \{1024:x}
	a: ask / = 200
	a: ask / = 200; hit
	a: stall 300 ; touch warm ; await counted
	a: ask / = 200; hit
	a: ask / = 200; hit
	a: ask / = 200; hit
	a: ask / = 200; hit
	a: stall 300 ; touch done ; await over
	do comes warm
	do count_calls
	do touch over
	log#   5 " 200 1024 .* hit=fresh
END
	for call in 'open|openat' close 'p?writev?|send[a-z]*'; do
		[ "$(calls "$call")" = 4 ] ||
			fail "4 hits took $(calls "$call") of $call"
	done
	# A read that finds nothing more may stand before a poll.
	reads=$(calls 'p?readv?|recv[a-z]*')
	[ "$reads" -ge 8 ] && [ "$reads" -le 12 ] ||
		fail "4 hits took $reads reads: $(cut -c1-40 calls)"
	others=$(calls -v 'open|openat|close|p?readv?|recv[a-z]*|p?writev?|send[a-z]*|p?poll|epoll[a-z_]*')
	[ "$others" = 0 ] || fail "$others other calls: $(cut -c1-40 calls)"
	count_from=$(($(wc -l < all.calls) + 1))
	play -n 'three that are stored' <<'END'
	replies 200 Cache-Control: max-age=999 | \{1024:x}
	ask    /1 = 200
	ask    /2 = 200
	ask    /3 = 200
	client stall 300
	log#   3 miss=stored
END
	tail -n "+$count_from" all.calls > calls
	[ "$(calls 'pwrite(64)?')" = 9 ] && ! grep sync calls ||
		fail "3 took $(calls 'pwrite(64)?') writes: $(cut -c1-40 calls)"
}

test_cache_renewed() { # a 304 brings the client its fields, also those that can't be stored
	start_cache
	old='Cache-Control: public, max-age=3600\nETag: "a"'
	play 'what is private now is so for the client, and no longer stored' <<END
	reply  200 $old | one\l
	reply  304 Cache-Control: private, no-store\nETag: "a"
	reply  200 Cache-Control: no-store | two\l
	ask    / = 200 | one\l
	ask    / Cache-Control: no-cache = 200
	sees   Cache-Control: private, no-store
	sees   one\l
	ask    / = 200 | two\l
	== so it is for who may not have it stored, but the entry stays
	reply  200 Cache-Control: max-age=100\nETag: "a"\nAge: 90000 | one\l
	reply  304 Cache-Control: max-age=100\nETag: "a"
	reply  304 Cache-Control: max-age=100\nETag: "a"
	ask    / = 200 | one\l
	ask    / Authorization: Basic eDp5 = 200; fwd=stale; fwd-status=304; ttl=
	sees#  2 ^Age: [01]\$
	sees   one\l
	ask    / = 200; fwd=stale; fwd-status=304 | one\l
	gets#  2 ^If-None-Match: "a"
	== more fields than there is room for in the file
	reply  200 $old | one\l
	reply  304 X-Long: \{1000:x}\nCache-Control: max-age=9\nETag: "a"
	reply  200 $old | two\l
	ask    / = 200 | one\l
	ask    / Cache-Control: no-cache = 200
	sees~  ^X-Long: (x{200}){5}\$
	sees   one\l
	ask    / = 200 | two\l
	== a cookie is for the client that asked
	reply  200 $old | one\l
	reply  304 Set-Cookie: s=new\nETag: "a"
	ask    / = 200 | one\l
	ask    / Cache-Control: no-cache = 200
	sees   Set-Cookie: s=new
	sees   one\l
	ask    / = 200; hit | one\l
	sees#  1 ^Set-Cookie
	== and replaces one that the entry has
	reply  200 Cache-Control: max-age=99\nETag: "a"\nSet-Cookie: s=old | one\l
	reply  304 Set-Cookie: s=new\nETag: "a"
	ask    / = 200 | one\l
	ask    / Cache-Control: no-cache = 200
	sees   one\l
	ask    / = 200; hit | one\l
	sees#  1 ^Set-Cookie: s=old
	sees#  2 ^Set-Cookie: s=new
	== which is not kept for all
	reply  200 Cache-Control: public, max-age=99\nETag: "a"\nSet-Cookie: s=old | one\l
	reply  304 Set-Cookie: s=new\nETag: "a"
	ask    / = 200 | one\l
	ask    / Cache-Control: no-cache = 200
	sees   Set-Cookie: s=new
	sees   one\l
	ask    / = 200; hit | one\l
	sees#  1 ^Set-Cookie: s=old
	sees#  1 ^Set-Cookie: s=new
	== a range of it
	reply  200 $old | abcdefgh
	reply  304 X-New: 1\nETag: "a"
	ask    / = 200 | abcdefgh
	ask    / Cache-Control: no-cache\nRange: bytes=2-4 = 206
	sees   X-New: 1
	sees   cde
END
	date='Sun, 06 Nov 1994 08:49'
	play 'a 304 about another version: asked again' <<END
	reply  200 ETag: W/"a"\nCache-Control: max-age=9 | one\l
	reply  304 ETag: W/"b"
	reply  200 ETag: W/"b"\nCache-Control: max-age=9 | two\l
	ask    / = 200 | one\l
	ask    / Cache-Control: no-cache = 200 | two\l
	ask    / = 200; hit | two\l
	== by its date
	reply  200 Last-Modified: $date:37 GMT\nCache-Control: max-age=9 | one\l
	reply  304 Last-Modified: $date:36 GMT
	reply  200 Last-Modified: $date:36 GMT\nCache-Control: max-age=9 | two\l
	ask    / = 200 | one\l
	ask    / Cache-Control: no-cache = 200 | two\l
	ask    / = 200; hit | two\l
	== the same, weak or not
	reply  200 ETag: "a"\nCache-Control: max-age=9 | one\l
	reply  304 ETag: W/"a"
	ask    / = 200 | one\l
	ask    / Cache-Control: no-cache = 200; fwd=request; fwd-status=304 | one\l
END
}

test_cache_nominated() { # Connection takes no field from what the cache decides by
	start_cache
	play 'a field that a client takes off is not what the server saw' <<'END'
	reply  200 Vary: Origin\nCache-Control: max-age=9 | bare
	reply  200 Vary: Origin\nCache-Control: max-age=9 | full
	ask    / Origin: https://a\nConnection: origin = 200 | bare
	ask    / Origin: https://a = 200 | full
	ask    / = 200; hit | bare
	== a server that takes off Vary or Cache-Control
	reply  200 Vary: Accept-Language\nCache-Control: max-age=9\nConnection: Vary | german
	reply  200 Vary: Accept-Language\nCache-Control: max-age=9 | english
	ask    / Accept-Language: de = 200 | german
	ask    / Accept-Language: en = 200 | english
	== and no-cache
	reply  200 Cache-Control: no-cache\nConnection: Cache-Control\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT | one
	reply  200 Cache-Control: no-store | two
	ask    / = 200 | one
	ask    / = 200 | two
END
}

# An entry that may be used while it is refreshed; a request with these fields
# has it refreshed, by a 304 and by a new answer (or BY one), without them:
# refreshes WANT 'request fields\n' [BY [DIRECTIVES]]
refreshes() {
	for refreshes_by in ${3:-304 200}; do
		what="$2: refreshed by $refreshes_by"
		case $refreshes_by in
		304) refreshes_body='' refreshes_see=one refreshes_log='0 .* hit=validated' ;;
		*) refreshes_body='| two\l' refreshes_see=two refreshes_log='4 .* miss=stored' ;;
		esac
		play -n "$what" <<END
	reply  200 Connection: close\nAge: 100\nETag: "a"\nCache-Control: max-age=60, stale-while-revalidate=999${4-} | one\l
	reply  $refreshes_by X\nConnection: close\nETag: "a"\nCache-Control: max-age=888${4-} $refreshes_body
	origin touch told.$plays
	origin next
	reply  200 | other
	ask    /x = 200 | one\l
	ask    /x $2 = $1; .*hit
	# What came before another answer is stored.
	client await told.$plays
	ask    /other = 200
	ask    /x = 200; hit; ttl= | $refreshes_see\l
	sees#  1 max-age=888
	gets#  3 ^GET
	gets   -- connection 2
	gets   GET /x HTTP/1.1
	gets#  1 ^If-None-Match: 
	gets#  1 ^If-None-Match: "a"$
	gets!~ ^(Cache-Control|Pragma|Range|If-(Range|Match|Modified-Since|Unmodified-Since)):
	log    miss=stored
	log    hit=stale
	log    " 200 $refreshes_log
END
	done
}

test_cache_refresh() { # the request in the background has nothing of the client's wishes
	start_cache
	refreshes 200 ''
	refreshes 200 'Cache-Control: max-stale=9\n'
	refreshes 200 'Cache-Control: stale-if-error=5\nPragma: no-cache\n'
	refreshes 200 'Authorization: Basic eDp5\n' '' ', public'
	# Without public only a 304 may count for those who have no login.
	refreshes 200 'Authorization: Basic eDp5\n' 304
	refreshes 200 'Authorization: Basic eDp5\nCache-Control: max-stale=9\n' 304
	refreshes 206 'Range: bytes=1-2\n'
	refreshes 206 'Range: bytes=1-2\nIf-Range: "a"\n'
	refreshes 200 'If-None-Match: "z"\n'
	refreshes 304 'If-None-Match: "a", "z"\n'
	refreshes 200 'If-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\n'
	# The same where the client would take it stale without asking anybody.
	refreshes 200 'Cache-Control: max-stale=500\n'
	refreshes 200 'Cache-Control: max-stale\nPragma: no-cache\n'
	served
}

test_cache_no_store_validates() { # a client's no-store that validates an entry leaves it there
	start_cache
	for fields in 'Cache-Control: no-store\n' 'Cache-Control: no-cache, no-store\n' \
	    'Authorization: Basic eDp5\n'; do
		play -n "$fields" <<END
	reply  200 Connection: close\nAge: 100\nETag: "a"\nCache-Control: max-age=60 | one\l
	reply  304 Connection: close\nETag: "a"\nCache-Control: max-age=60
	a: ask /x = 200 OK | one\l
	a: ask /x $fields = 200 OK | one\l
	a: ends ^open$
	do asked 2
	b: ask /x Cache-Control: max-stale, only-if-cached = 200 OK | one\l
	b: ends .
	do asked 2
END
	done
}

test_cache_range_stale() { # a range of a stale entry: asked for with it, from the entry or as it comes
	start_cache
	play '304: the part of the entry' <<'END'
	reply  200 Connection: close\nAge: 100\nETag: "a"\nCache-Control: max-age=60 | abcdefghij
	reply  304 Connection: close\nETag: "a"\nCache-Control: max-age=999
	ask    / = 200 | abcdefghij
	ask    / Range: bytes=2-4 = 206
	sees   Content-Range: bytes 2-4/10
	sees   Content-Length: 3
	sees   cde
	ask    / = 200; hit | abcdefghij
	gets   -- connection 2
	gets   Range: bytes=2-4
	gets#  1 ^If-None-Match: "a"
	gets#  2 ^GET
	log    200 10 .* miss=stored
	log    206 3 .* hit=validated
	log    200 10 .* hit=fresh
	== 206 of another version: that one, and the entry is gone
	reply  200 Connection: close\nAge: 100\nETag: "a"\nCache-Control: max-age=60 | abcdefghij
	reply  206 Connection: close\nETag: "b"\nCache-Control: max-age=999\nContent-Range: bytes 2-4/10 | CDE
	reply  200 Connection: close\nETag: "b"\nCache-Control: max-age=999 | ABCDEFGHIJ
	ask    / = 200 | abcdefghij
	ask    / Range: bytes=2-4 = 206
	sees   ETag: "b"
	sees   Content-Range: bytes 2-4/10
	sees   CDE
	ask    / = 200 | ABCDEFGHIJ
	gets   -- connection 2
	gets   Range: bytes=2-4
	gets#  1 ^If-None-Match: "a"
	gets#  3 ^GET
	== 200 of another version: the whole of it, stored
	reply  200 Connection: close\nAge: 100\nETag: "a"\nCache-Control: max-age=60 | abcdefghij
	reply  200 Connection: close\nETag: "b"\nCache-Control: max-age=999 | ABCDEFGHIJ
	ask    / = 200 | abcdefghij
	ask    / Range: bytes=2-4 = 200 | ABCDEFGHIJ
	ask    / Range: bytes=2-4 = 206 | CDE
	gets#  2 ^GET
END
}

test_rules_cached_body() { # a text in the body of what the cache answers
	start_names 127.0.0.1 -- -c "$T/cache" -e 'allow field request X-In .' \
	    -e 'allow address 10.0.0.0/8' -e 'deny "evil" body evil'
	play -n 'beside a line that asks for the address' <<'END'
	reply  200 Cache-Control: max-age=99 | xxevilxxx\l
	ask    http://two.test:%p/ X-In: 1 = 200 | xxevilxxx\l
	client send GET http://two.test:%p/ HTTP/1.1\nHost: x\n\n ; eof
	sees   HTTP/1.1 200 OK
	sees~  ^-- end eof
	sees#  1 evil
	log    miss=stored
	log    hit=fresh .* end=rule rule=-e:3 why=
END
}

test_rules_cached_validated() { # an entry that is validated is judged by where it came from
	need_me
	unset PEER_FROM
	name=a start_names 127.0.0.1 -- -c "$T/cache"
	origin o <<'END'
reply 200 Connection: close\nAge: 100\nETag: "a"\nCache-Control: max-age=60 | secret\l
END
	client a 'ask http://two.test:%p/'
	ended o.1
	stop_proxy
	origin e -a "$me" -p "$origin_port" <<'END'
replies 304 ETag: "a"\nCache-Control: max-age=60
END
	need_me
	start_names "$me" -- -c "$T/cache" -e "allow client $me"
	client b 'ask http://two.test:%p/'
	seen b <<'END'
= HTTP/1.1 403 Forbidden
! secret\l
END
}

test_rules_cached_address() { # lines about the cache know where an entry came from
	start_names 127.0.0.1 -- -c "$T/cache" -e 'cache 1h address 127.0.0.0/8'
	play -n 'a lifetime' <<'END'
	reply  200 ETag: "a" | ok\l
	ask    http://two.test:%p/ = 200 | ok\l
	ask    http://two.test:%p/ = 200 | ok\l
	gets#  1 ^GET
	log    200 3 .* miss=stored
	log    200 3 .* hit=fresh
END
	start_names 127.0.0.1 -- -c "$T/cache" \
	    -e 'nocache address 127.0.0.0/8 field request X-No .' \
	    -e 'via http://127.0.0.1:1 direct'
	play -n 'nocache; an entry that came directly after all' <<'END'
	replies 200 Cache-Control: max-age=99 | ok\l
	ask    http://two.test:%p/ = 200 | ok\l
	ask    http://two.test:%p/ = 200 | ok\l
	ask    http://two.test:%p/ X-No: 1 = 200 | ok\l
	gets#  2 ^GET
	log    200 3 .* miss=stored
	log    200 3 .* hit=fresh
	log    200 3
END
	start_names 127.0.0.1 -- -c "$T/cache" -e 'to 127.0.0.9:1 field X-To .' \
	    -e 'via http://127.0.0.9:1 field X-Via .' \
	    -e 'deny 450 address 127.0.0.1 field X-Deny .'
	play -n 'another way now, and access is judged by where the entry came from' <<'END'
	reply  200 Cache-Control: max-age=99 | ok\l
	ask    http://two.test:%p/ = 200 | ok\l
	ask    http://two.test:%p/ X-To: 1 = 200 | ok\l
	ask    http://two.test:%p/ X-To: 1\nX-Deny: 1 = 450
	ask    http://two.test:%p/ X-Via: 1 = 200 | ok\l
	ask    http://two.test:%p/ X-Via: 1\nX-Deny: 1 = 450
END
}

test_rules_cached_not_modified() { # an answer without its body is no body without the text
	start_cache -e 'allow field request X-In .' \
	    -e 'deny "not ours" not body OURS'
	play -n 'a 304 from an entry' <<'END'
	reply  200 Cache-Control: max-age=99\nETag: "a" | OURS!\l
	ask    / X-In: 1 = 200 | OURS!\l
	ask    / If-None-Match: "a" = 304 Not Modified
	ask    / = 200 | OURS!\l
	log    miss=stored
	log    304 0 .* hit=fresh
	log    200 6 .* hit=fresh
	log!   why=
END
}

test_rules_cached_trailer() { # the rest of an answer brings no trailer that a line takes away
	start_cache -e 'unset response X-Secret'
	play -n 'one follows, the answer breaks off' <<'END'
	reply  200 Cache-Control: max-age=999\nETag: "a"\nTransfer-Encoding: chunked | 4\nfour\n
	origin await more ; reset
	origin next
	reply  200 Connection: close\nCache-Control: max-age=999\nETag: "a"\nTransfer-Encoding: chunked | 8\nfourfive\n0\nX-Secret: 1\n\n
	a: send GET http://%O/ HTTP/1.1\nHost: %O\n\n
	a: until four ; touch began ; eof
	a: sees~ ^-- end
	do comes began
	b: send GET http://%O/ HTTP/1.1\nHost: %O\nTE: trailers\nConnection: TE, close\n\n
	b: until four ; touch more ; eof
	b: sees~ five
	b: sees~ ^-- end eof
	b: sees!~ X-Secret
	b: ends .
END
}

test_rules_cached_login() { # what belongs to a login that a rule puts in is not stored
	start_cache -e 'set request Authorization "Basic eDp5" field request X-In .'
	play 'for those who have it' <<'END'
	reply  200 Cache-Control: max-age=99 | secret\l
	reply  200 Cache-Control: max-age=99 | none\l
	ask    / X-In: 1 = 200 | secret\l
	ask    / = 200 | none\l
	gets#  1 ^Authorization: Basic eDp5$
END
}

test_rules_cached_statuses() { # `cache' is about what may be stored: no error, no way to a login
	start_cache -e 'cache 1h'
	play 'an error, a redirection, a page' <<'END'
	reply  502 No\nETag: "a" | no\l
	reply  302 There\nLocation: /login\nETag: "a" | go\l
	reply  200 | ok\l
	ask    / = 502 | no\l
	ask    / = 302 | go\l
	ask    / = 200 | ok\l
	ask    / = 200 | ok\l
	gets#  3 ^GET
	log    502 3 .* miss=status
	log    302 3 .* miss=status
	log    200 3 .* miss=stored
	log    200 3 .* hit=fresh
END
}

test_rules_cached_denied() { # the log of an entry that is denied tells of no hit and no miss
	start_cache -e 'deny type text/evil not field request X-In .'
	play 'from the cache' <<'END'
	reply  200 Content-Type: text/evil\nCache-Control: max-age=99 | evil
	ask    / X-In: 1 = 200 | evil
	ask    / = 403 Forbidden
	log    200 4 .* miss=stored
	log    403 [0-9]+ "-" "-" up=0 .* end=done rule=-e:1
END
}

# ---- 18. Names --------------------------------------------------------------

test_names_lookup() { # a name is looked up, timed, and remembered
	start_names 127.0.0.1
	play 'twice' <<END
	reply  200 Connection: close | ok
	client send GET http://two.test:%p/ HTTP/1.1\nHost: two.test\n\n
	client answer
	client send GET http://TWO.test:%p/ HTTP/1.1\nHost: two.test\n\n
	client answer
	ask    CONNECT two.test:%p
	client shut ; eof
	sees#  3 ^(ok)?HTTP/1.1 200
	gets   Host: two.test:%p
	gets   Host: TWO.test:%p
	log    "GET http://two.test:%p/ HTTP/1.1" 200 2 .* dns=N connect=N first=N .* server=%O end=done
	log    "GET http://TWO.test:%p/ HTTP/1.1" 200 2 .* server=%O end=done
	log    "CONNECT two.test:%p HTTP/1.1" 200 .* server=%O end=
	== our own address under another name is a loop
	ask    http://two.test:${proxy##*:}/ = 508
	log#   1 "GET http://two
END
}

test_names_many() { # all addresses of a name are tried
	start_names 127.0.0.2 127.0.0.3 127.0.0.4 127.0.0.5 127.0.0.6 127.0.0.7 \
	    127.0.0.8 127.0.0.9 127.0.0.10 127.0.0.11 127.0.0.12 127.0.0.13 \
	    127.0.0.14 127.0.0.15 127.0.0.16 127.0.0.1
	play 'the last of sixteen' <<'END'
	reply  200 Connection: close | ok
	ask    http://many.test:%p/ = 200 OK
	log    200 2 .* server=127.0.0.1:%p end=done
END
}

test_names_crash() { # a look-up that dies is noticed at once, and leaves no zombie
	start_names 127.0.0.1
	for n in 1 2 3; do
		play 'it dies' <<'END'
	ask    http://crash.test:1/ Connection: close = 502
	log    "GET http://crash.test:1/ HTTP/1.1" 502 .* why="the name lookup failed"
END
	done
	has log ' total=[0-9]\{1,3\} '
	[ -d /proc/self ] || skip "no /proc"
	"$peer" sleep 100
	cat /proc/[0-9]*/stat > stats 2> /dev/null
	helper=$(awk -v of="$proxy_pid" '$4 == of { print $1 }' stats | head -n 1)
	[ -n "$helper" ] || fail "no helper"
	awk -v of="$helper" -v proxy="$proxy_pid" '
	$3 == "Z" && ($4 == of || $4 == proxy) { exit 1 }' stats ||
		fail "a zombie is left"
}

test_names_slow() { # a name server that is silent delays nobody else
	start_names 127.0.0.1
	for n in 1 2 3 4 5 6 7 8 9; do
		client_bg s$n \
		    'send GET http://slow.test/ HTTP/1.1\nHost: x\n\n ; touch asked ; answer'
	done
	comes asked
	"$peer" sleep 100
	before=$("$peer" clock)
	play 'another name' <<'END'
	reply  200 Connection: close | ok
	ask    http://two.test:%p/ = 200 | ok
END
	[ $(($("$peer" clock) - before)) -lt 8000 ] || fail "delayed"
	[ ! -f s1.end ] || fail "slow.test has an answer: $(head -n 1 s1)"
}

test_names_slow_limit() { # a name that takes too long: 504
	quick
	play 'no answer' <<'END'
	ask    http://slow.test/ = 504 error=dns_timeout
	log    "GET http://slow.test/ HTTP/1.1" 504 .* why="
END
}

# A name must be known, soon: name_known NAME
name_known() {
	patience 9000
	play -n "the name $1" <<END
	reply  200 Connection: close | ok
	ask    http://$1:%p/ = 200 | ok
END
	unset PEER_MS
}

find_helper() {
	has_children 1 || fail "no helper process: $children"
	helper=$children
}

test_names_helper_dies() { # without its helper the proxy starts another
	start_names 127.0.0.1
	find_helper
	kill -KILL "$helper"
	"$peer" sleep 100
	name_known two.test
	served
}

test_names_helper_hangs() { # the helper dies while a question hangs: names work again soon
	start_names 127.0.0.1
	find_helper
	client_bg s \
	    'send GET http://slow.test/ HTTP/1.1\nHost: x\n\n ; touch asked ; answer'
	comes asked
	"$peer" sleep 200
	kill -KILL "$helper"
	name_known two.test
	served
}

test_names_helper_forks() { # a helper that cannot fork: said at once, no descriptor is lost
	[ -d /proc/self/fd ] || skip "no /proc"
	start_names 127.0.0.1
	name_known one.test
	: > fork-fails
	patience 3000
	play -n 'no child for this name' <<'END'
	ask    http://two.test:1/ = 50[24]
	sees~  ^Proxy-Status: proxy-ID; error=dns_(error|timeout)
END
	find_helper
	kill -KILL "$helper"
	has err "can't start the helper for names"
	before=$(find "/proc/$proxy_pid/fd" | wc -l)
	"$peer" sleep 1400
	after=$(find "/proc/$proxy_pid/fd" | wc -l)
	[ "$after" -le "$before" ] ||
		fail "$before descriptors become $after while fork fails"
	counts 1 err "can't start"
	rm fork-fails
	name_known three.test
	served
}

test_names_burst() { # sixty names at once whose server takes its time: all are found
	start_names 127.0.0.1
	plain_origin
	many 60 late "send GET http://late@.test:${origin#*:}/ HTTP/1.1\nHost: x\n\n"
	counts 60 log '"GET http://late[0-9]*.test.* 200 .* end=' 20
	touch late.over
	served
}

test_names_hanging() { # forty names that hang keep no other name waiting
	start_names 127.0.0.1
	many 40 hang 'send GET http://slow@.test/ HTTP/1.1\nHost: x\n\n'
	"$peer" sleep 300
	name_known two.test
	touch hang.over
	served
}

test_names_hanging_end() { # forty names that hang do not keep standard output open
	have mkfifo && mkfifo piped.log || skip "no mkfifo"
	spawn lines cat piped.log
	name=piped start_names 127.0.0.1
	many 40 hang 'send GET http://slow@.test/ HTTP/1.1\nHost: x\n\n'
	"$peer" sleep 300
	kill -TERM "$proxy_pid"
	"$peer" sleep 100
	stop_proxy
	wait_exit "$spawned" 2 || fail "standard output is open"
	touch hang.over
}

# ---- 19. Log ----------------------------------------------------------------

test_log_injection() { # no input can split a line or forge a field; the longest line ends like every other
	play 'fields' <<'END'
	reply  200 | ok
	ask    / User-Agent: a"b\\c d\te\xff" 200 1 "x\nReferer: %41"\x80 = 200 | ok
	log#   1 .
	log    "GET http://%O/ HTTP/1.1" 200 2 "%41%22%80" "a%22b%5[Cc]c%20d%09e%[Ff][Ff]%22%20200%201%20%22x" up=0
	== a request that is none
	client send "\\\x1b[31m\x80\r x y z\n\n ; eof
	sees~  ^HTTP/1.1 400
	log#   1 .
	log    \[DATE\] "(- )?%22%5[Cc]%1[Bb]\[31m%80%0[Dd][^"]*" 400
END
	play 'a long one is cut' <<END
	client send GET \{$((line_max - 200)):"} ; shut ; eof
	log#   1 .
	log    " 400 |" 499 |" 408 
END
	longest=$(awk '{ if (length > n) n = length } END { print n }' log)
	[ "$longest" -lt $((buffer * 3 / 8 + 300)) ] ||
		fail "a line of $longest bytes"
	[ "$longest" -gt $((buffer / 4)) ] || fail "only $longest bytes"
	log_is_sound
	lacks log '^127.0.0.1 - [^-]'
	unit line
}

test_log_first() { # first= is the time to the response, not to a 1xx before it
	play '103 at once, 200 later' <<'END'
	origin head ; say 103 X: y ; stall 300 ; say 200 | ok
	ask    /
	sees   HTTP/1.1 200 OK
	log    200 2 .* end=done
END
	has log ' first=\([3-9]..\|[0-9]....*\) total='
}

test_log_file() { # -o file, reopened on HUP
	start_proxy -o "$T/file"
	served
	has file http://127
	mv file old
	kill -HUP "$proxy_pid"
	comes file
	served
	has file http://127
	counts 1 old ''
	[ ! -s log ] || fail "standard output is written, too"
	rm file
	mkdir file
	kill -HUP "$proxy_pid"
	has err "^proxy: .*file" 5
	served
}

test_log_full() { # a log that can't be written is said once, serving goes on
	[ -c /dev/full ] || skip "no /dev/full"
	start_proxy -o /dev/full
	served
	served
	served
	has err "^proxy: .*log.*[Ss]pace" 5
	served
	counts 1 err 'the log'
	stop_proxy
}

# The proxy of this test has its system log at a logger that reads so many lines
# into the file "logged": logger N
logger() {
	our_names
	spawn logged "$peer" logger log.socket "$1"
	has logged ready 5
}

test_log_syslog() { # -o syslog: each line a datagram; a logger that stops reading stops nobody
	logger 2
	start_proxy -o syslog
	served
	counts 2 logged ''
	grep '^<30>[A-Z][a-z][a-z] [ 1-3][0-9] [0-9:]* proxy\[[0-9]*\]: 127.0.0.1 - - .*end=done$' \
	    logged > /dev/null || fail "logged: $(cat logged)"
	[ ! -s log ] || fail "standard output is written, too"
	play '80 lines more than it reads' <<'END'
	replies 200 | ok\l
	client send \{80:GET http://%O/ HTTP/1.1\nHost: x\n\n} ; shut ; eof
	sees#  80 ^HTTP/1.1 200
END
	kill -HUP "$proxy_pid"
	served
	# It comes back, and hears how much it missed.
	kill "$spawned"
	wait_exit "$spawned" 5
	rm log.socket
	served
	# Where 80 lines fill a buffer, another reason came before.
	has err 'lines are lost: \(No such file\|its reader is too slow\)'
	spawn again "$peer" logger log.socket 99
	has again ready 5
	served
	served
	has again end=done
	stop_proxy
}

test_log_standard_closed() { # a closed standard descriptor, and no /dev/null: it says so and ends
	[ "$(id -u)" = 0 ] || skip "not root"
	[ -z "${EMULATOR-}" ] || skip "the emulator needs its libraries"
	mkdir root
	linked -static -o root/proxy || skip "cc can't link statically"
	chroot root /proxy -l 127.0.0.1:0 >&- 2> said &
	wait_exit $! 5
	[ $? = 1 ] || fail "exit status"
	has said '^proxy: standard descriptor 1 is closed, and /dev/null'
	chroot root /proxy -l 127.0.0.1:0 < /dev/null > out 2>&- &
	wait_exit $! 5
	[ $? = 1 ] || fail "exit status without standard error"
	[ ! -s out ] || fail "says: $(cat out)"
}

test_log_terminal_stalls() { # a terminal that nobody reads stops neither log nor trace nor service
	spawn said "$peer" stalled "$proxy_bin" -v -l 127.0.0.1:0
	wait_for 20 '[ -s said ]' || skip "no terminals here"
	proxy=$(cat said)
	awk 'BEGIN { while (n++ < 60)
		print "send OPTIONS * HTTP/1.1\\nHost: x\\n\\n ; answer" \
		    (n % 3 ? "" : " ; dial") }' | client c
	counts 60 c '^HTTP/1.1 200'
	ends c '^open$'
}

test_log_syslog_long() { # a line longer than the logger's datagrams is cut, not lost
	have strace || skip "no strace"
	strace -D -o strace.try -e inject=read:error=EINTR:when=999 true \
	    2> /dev/null || skip "strace can't inject"
	sanitized && skip "$special says nothing"
	logger 9
	proxy_wrap="strace -D -o calls -e inject=sendto:error=EMSGSIZE:when=1"
	start_proxy -o syslog
	served
	has logged 127.0.0.1
	lacks logged 'end=done'
	served
	has logged end=done
	proxy_pid=
}

test_log_end() { # lines that nobody read when the proxy ends are counted
	pipe_open pipe
	"$proxy_bin" -l 127.0.0.1:0 > pipe 2> err 9<&- &
	proxy_pid=$!
	echo "$proxy_pid" >> .proxies
	has err "^proxy: listening" 15
	proxy=$(sed -n 's/^proxy: listening on //p' err)
	awk 'BEGIN { while (n++ < 70) print (n > 1 ? "dial ; " : "") \
		"send GET /\\{3000:0} HTTP/1.1\\nHost: x\\n\\n ; eof" }' | client c
	came_to c eof
	kill -TERM "$proxy_pid"
	wait_exit "$proxy_pid" 10 || fail "exit status"
	: > .proxies
	has err '^proxy: [1-9][0-9]* lines of the log were lost'
}

test_log_memory_first() { # memory that transfers have taken up leaves enough to refuse others
	sanitized && skip "$special takes all memory"
	[ "$buffer" -ge 65536 ] || skip "small buffers leave memory"
	origin o \
	    'head ; send HTTP/1.1 200 OK\nContent-Length: 20000000\n\n ; fill 20000000'
	proxy_wrap='limited 12000' start_proxy
	asks='send GET http://%O/ HTTP/1.1\nHost: %O\nConnection: close\n\n'
	many 120 stuck "$asks"
	"$peer" sleep 2000
	for n in 1 2 3 4 5 6 7 8 9 10; do
		client late "$asks ; want 12"
		head -n 1 late
	done > answers
	touch stuck.over
	counts 10 answers '^HTTP/1.1 [25]0[03]'
	has answers '^HTTP/1.1 503'
	wait_for 10 'grep "\" 503 " log > /dev/null' || fail "not in the log"
}

test_log_empty_line() { # an empty line in two pieces, then the end: as if nothing came
	for end in shut close reset; do
		play "$end" <<END
		client send \r ; stall 150 ; send \l
		client stall 150
		client $end
		log!   .
END
	done
	kill -0 "$proxy_pid" || fail "the proxy is gone"
}

# Requests whose lines fill a pipe and more: fill_log N, into the log.
fill_log() {
	fill_long=$(printf '%0600d' 0)
	client fill <<END
send \\{$1:GET /$fill_long HTTP/1.1\\nHost: %P\\n\\n}
send GET / HTTP/1.1\\nHost: %P\\nConnection: close\\n\\n
eof
END
	[ "$(cat fill.end)" = eof ] || fail "requests: $(cat fill.end)"
}

test_log_disk() { # a disk that becomes full within a line: no line follows a part of another
	mkdir disk
	mount -t tmpfs -o size=64k tmpfs "$T/disk" 2> mount.err ||
		skip "cannot mount: $(head -n 1 mount.err)"
	trap 'stop_proxy; umount "$T/disk"; reap' EXIT
	head -c 57000 /dev/zero > disk/other
	start_proxy -o disk/log
	fill_log 60
	has err "^proxy: the log can't be written, lines are lost: No space"
	tail -n 1 disk/log | grep 'such page"$' > /dev/null &&
		skip "the disk was full at the end of a line"
	rm disk/other
	served
	has disk/log "GET http://127"
	awk '!/^127.0.0.1 - - .* end=done( why="the proxy has no such page")?$/ ||
	    gsub(/ - - /, "") != 1' disk/log > odd
	[ ! -s odd ] || fail "no line: $(cat odd)"
	has err '^proxy: the log is written again, [1-9][0-9]* lines were lost'
}

# The log goes to a pipe that nobody reads, as descriptor 9 here.
piped_log() {
	pipe_open pipe
	start_proxy -o "$T/pipe" 9>&-
}

test_log_pipe() { # a log on a pipe that nobody reads: serving goes on, lines come when it is read
	piped_log
	fill_log 150
	served 9>&-
	rests "the log's pipe full"
	spawn lines cat pipe 9>&-
	exec 9>&-
	# All that waited has come when none has for a while.
	before=-1
	wait_for 20 'last=$before
		before=$(wc -l < lines)
		[ "$before" -gt 5 ] && [ "$before" = "$last" ] ||
			{ "$peer" sleep 1700; false; }' ||
		fail "$before lines came out of the pipe"
	served
	wait_for 3 '[ "$(wc -l < lines)" -gt "$before" ]' ||
		fail "no line for the last request"
	[ "$(wc -l < lines)" = $((before + 1)) ] ||
		fail "$(wc -l < lines) lines, $before before one more request"
	stop_proxy
}

test_log_pipe_term() { # the same, and TERM: exit 0
	piped_log
	fill_log 150
	served 9>&-
	stop_proxy
	exec 9>&-
}

test_log_fifo() { # HUP with a log whose reader has gone: serving goes on
	piped_log
	served 9>&-
	exec 9>&-
	kill -HUP "$proxy_pid"
	patience 3000
	"$peer" sleep 100
	served 9>&-
	served 9>&-
	stop_proxy
}

test_start_large_files() { # files over 4 GiB: the log, and one that a rule answers with
	dd if=/dev/zero of=large bs=1 count=1 seek=5000000000 2> /dev/null ||
		skip "no sparse files here"
	dd if=/dev/zero of=log.large bs=1 count=1 seek=5000000000 2> /dev/null
	start_proxy -o log.large -e "answer 200 file $T/large"
	client c 'ask HEAD http://x.test/'
	has c 'Content-Length: 5000000001'
	wait_for 5 'tail -c 200 log.large | grep "HEAD http://x.test/ HTTP/1.1. 200" > got' ||
		fail "no line: $(tail -c 300 log.large)"
}

test_bad_credentials() { # a password in a URL is neither logged nor traced nor sent back
	start_proxy -vv
	for request in 'GET http://bob:s3 cret@%O/ HTTP/1.1\nHost: %O' \
	    'GET http://bob:s3cret#@%O HTTP/1.1\nHost: %O' \
	    'GET http://"s3cret@%O/?a@b HTTP/1.1\nHost: %O' \
	    'GET\thttp://bob:s3cret@%O/ HTTP/1.1\nHost: %O' \
	    'http://bob:s3cret@%O/' \
	    'GET http://%O/#s3cret HTTP/1.1\nHost: %O\nX-A : b' \
	    'CONNECT bob:s3cret@%O HTTP/1.1\nHost: %O' \
	    'GET http://bob:s3cret@%O:x/ HTTP/1.1\nHost: %O' \
	    'GET http://bob:s3cret@%O/ HTTP/1.1\nHost: %O\nX-A : b' \
	    'GET ftp://bob:s3cret@%O/ HTTP/1.1\nHost: %O' \
	    'GET http://a:b@bob:s3cret@%O/ HTTP/1.1\nHost: %O'; do
		play -n "$request" <<END
		origin head
		client send $request\n\n ; eof
		sees~  ^HTTP/1.1 (400|501)
		sees!~ s3cret
		gets!~ .
		log#   1 .
		log!   s3cret
		err!~  s3cret
END
	done
	served
}

# ---- 20. Recording: HAR 1.2 -------------------------------------------------

# The recording s.har has a line that matches each ERE, in their order.
recorded() {
	what=$1
	shift
	for recorded_ere; do
		wait_for 5 'grep -E -e "$recorded_ere" s.har > /dev/null' ||
			fail "$what: no $recorded_ere in: $(head -c 3000 s.har)"
	done
	[ "$(tail -n 1 s.har)" = ']}}' ] || fail "$what: no end"
}

test_record() { # -w: heads, bodies, times and reasons, in HAR
	start_proxy -w s.har -e 'deny url /no' \
	    -e "$(printf 'deny "f\303\274r alle" url /fuer')"
	play 'a GET' <<'END'
	reply  200 Content-Type: text/plain\nX-A: a"b\\c | h\xc3\xa9llo\l"you"\\\t.
	ask    /p?a=1&b&c=%20=#f Accept-Encoding: gzip\nAuthorization: Basic c2VjcmV0 = 200
	gets!~ ^Accept-Encoding
	== a POST
	reply  201 Location: /there | ok
	ask    POST / Content-Type: a/b | x=y = 201
	== logins in URLs
	reply  302 Location: http://me:pw3cret@h/
	ask    / Referer: http://me:pw3cret@h/ = 302
	== a coded body
	reply  200 Content-Encoding: gzip\nTransfer-Encoding: chunked | 3\nabc\n0\n\n
	ask    /gzip = 200
	== bytes that are no text
	reply  200 | \xff\x00a
	ask    /bytes = 200
	== a body too long
	reply  200 Content-Length: 1500000 ; fill 1500000
	client send GET http://%O/long HTTP/1.1\nHost: x\n\n ; until \n\n ; skip 1500000
	== a tunnel
	origin until ping ; send pong ; eof
	ask    CONNECT %O Proxy-Authorization: Basic c2VjcmV0
	client send ping ; until pong
	== a tunnel by Upgrade, with a long URL
	origin head ; say 101 Upgrade: x\nConnection: upgrade ; eof
	client send GET http://%O/\{200:u}?b=c HTTP/1.1\nHost: x\nConnection: upgrade\nUpgrade: x\n\n ; until \n\n
	== a refusal
	ask    http://x.test/no = 403
	ask    http://x.test/fuer = 403
	== no request at all
	client send nonsense\n\n ; eof
	== nor this
	client send /a "b\n\n ; eof
	== a malformed Host
	client send PUT /x HTTP/1.1\nHost: a b"c\n\n ; eof
	== a request to the server as a whole
	client send OPTIONS * HTTP/1.1\nHost: h:9\nMax-Forwards: 0\n\n ; answer
END
	recorded GET '^[{]"startedDateTime":"20[0-9-]*T[0-9:]*[.][0-9]{3}Z","cache":[{][}],"connection":"127.0.0.1:[0-9]*","serverIPAddress":"127.0.0.1","comment":"end=done","request":[{]"method":"GET","httpVersion":"HTTP/1.1","url":"http://[0-9.:]*/p[?]a=1&b&c=%20=","queryString":\[[{]"name":"a","value":"1"[}],[{]"name":"b","value":""[}],[{]"name":"c","value":"%20="[}]\],"cookies":\[\],"headers":\[[{]"name":"Host",.*[{]"name":"Accept-Encoding","value":"gzip"[}],[{]"name":"Authorization","value":"[*]{3}"[}]\],"headersSize":[0-9]*,"bodySize":0[}],"response":[{]"status":200,"statusText":"OK","httpVersion":"HTTP/1.1","redirectURL":"","cookies":\[\],"headers":\[.*[{]"name":"X-A","value":"a\\"b\\\\c"[}]' \
	    '"bodySize":15,"content":[{]"size":15,"mimeType":"text/plain","text":"h..llo\\n\\"you\\"\\\\\\t[.]"[}][}],"time":[0-9]*,"timings":[{]"blocked":[0-9]*,"dns":-1,"connect":[0-9]*,"send":[0-9]*,"wait":[0-9]*,"receive":[0-9]*[}][}],?$'
	recorded POST '"method":"POST".*"bodySize":3,"postData":[{]"mimeType":"a/b","text":"x=y"[}][}],"response":[{]"status":201,.*"redirectURL":"/there".*"text":"ok"'
	recorded coded '/gzip.*"content":[{]"size":3,"mimeType":"","text":"YWJj","encoding":"base64","_contentEncoding":"gzip"[}]'
	recorded bytes '/bytes.*"text":"/wBh","encoding":"base64"[}]'
	recorded long '/long.*"content":[{]"size":1500000,.*"comment":"cut: longer than 1048576 bytes"[}]'
	recorded tunnel '"method":"CONNECT","httpVersion":"HTTP/1.1","url":"connect://127[0-9.:]*".*"status":200,.*"content":[{]"size":0,"mimeType":"","text":""[}][}].*"blocked":-1,"dns":-1,'
	recorded upgrade '"url":"http://[0-9.:]*/u{200}[?]b=c","queryString":\[[{]"name":"b","value":"c"[}]\].*"status":101,'
	recorded words '"comment":"end=done, rule -e:2, f'"$(printf '\303\274')"'r alle".*/fuer'
	recorded refusal '"comment":"end=done, rule -e:1, a rule forbids this".*"status":403,.*"text":"403 Forbidden: ' \
	    '"comment":"end=[a-z]*, the request line is not METHOD URL HTTP/1.1".*"method":"","httpVersion":"HTTP/1.[01]","url":"invalid:nonsense"' '"url":"invalid:/a%20%22b"'
	recorded PUT '"url":"http://a%20b%22c/x"'
	recorded OPTIONS '"url":"http://h:9","queryString"'
	recorded login '"Referer","value":"http://[*]+@h/".*"redirectURL":"http://[*]+@h/".*"Location","value":"http://[*]+@h/"'
	lacks s.har c2VjcmV0
	lacks s.har pw3cret
	ls s.har.* > /dev/null 2>&1 && fail "a tape has a name"
	lines=$(($(wc -l < s.har) - 2))
	[ $lines = "$(wc -l < log)" ] || fail "$lines entries"
	case $(ls -l s.har) in
	-rw-------*) ;;
	*) fail "$(ls -l s.har)" ;;
	esac
}

test_record_given() { # -w: of a body what the client got, once, also if a rule slows it down
	start_cache -w s.har -e 'cut 10 url /cut' -e 'rate 200000 field X-A rate'
	play 'cut' <<'END'
	reply  200 | \{100:x}
	ask    /cut = 200 cut
END
	recorded cut '"size":10,"mimeType":"","text":"x{10}"[}]'
	rm -f s.har
	kill -HUP "$proxy_pid"
	comes s.har
	play -n 'a slow one leaves its fetch to those that follow it' <<'END'
	reply  200 Cache-Control: max-age=60\nETag: "a" | \{100000:x}
	a: send GET http://%O/x HTTP/1.0\nX-A: rate\n\n ; until \n\n ; touch a ; eof
	do comes a
	ask    /x = 200
	log    200 100000 .* hit=
	log    200 100000 .* miss=stored
END
	counts 2 s.har '"size":100000,'
}

test_record_folded() { # -w: a password in a folded field is hidden
	start_proxy -w s.har
	play 'folded' <<'END'
	client send GET http://%O/ HTTP/1.1\nHost: x\nAuthorization: Basic\n c2VjcmV0\n\n ; answer
	sees~  ^HTTP/1.1 400
	do     has s.har '"Authorization"'
	do     lacks s.har c2VjcmV0
END
}

test_record_goes_on() { # -w: killed, started again, moved: every file is whole
	start_proxy -w s.har
	play 'before it is killed' <<'END'
	reply  200 | one
	ask    /one = 200
END
	recorded one '"text":"one"'
	kill -KILL "$proxy_pid"
	wait "$proxy_pid" 2> /dev/null
	: > .proxies
	[ "$(tail -n 1 s.har)" = ']}}' ] || fail "no end"
	start_proxy -w s.har
	exits 1 -l 127.0.0.1:0 -w s.har
	has errors "^proxy: can't record to s.har: another process writes it"
	play 'after it' <<'END'
	reply  200 | two
	ask    /two = 200
	do recorded two '"text":"one"' '"text":"two"'
	do mv s.har old.har; kill -HUP "$proxy_pid"; wait_for 5 '[ -f s.har ]'
	== after it was moved
	reply  200 | three
	ask    /three = 200
END
	recorded three '"text":"three"'
	lacks old.har '"text":"three"'
	[ "$(tail -n 1 old.har)" = ']}}' ] || fail "no end"
	counts 1 old.har '^{"started.*}$'
}

test_record_kept() { # -w: at HUP another file has its name, and the recording goes on in its own
	start_proxy -w s.har
	play 'before' <<'END'
	reply  200 | one
	ask    /one = 200
END
	recorded one '"text":"one"'
	mv s.har old.har
	echo '{}' > s.har
	kill -HUP "$proxy_pid"
	has err "^proxy: can't open s.har again: it does not end as a recording does" 5
	play 'after' <<'END'
	reply  200 | two
	ask    /two = 200
END
	[ "$(cat s.har)" = '{}' ] || fail "s.har has changed"
	mv old.har s.har
	recorded two '"text":"one"' '"text":"two"'
}

test_record_wrong() { # -w: what it can't write to
	echo '{}' > other.har
	says <<'END'
1 -l 127.0.0.1:0 -w other.har = ^proxy: can't record to other.har: it does not end as a recording does
1 -l 127.0.0.1:0 -w no/s.har = ^proxy: can't record to no/s.har: No such file
1 -l 127.0.0.1:0 -w /dev/null = ^proxy: can't record to /dev/null: 
END
	[ "$(cat other.har)" = '{}' ] || fail "other.har has changed"
}

test_record_full() { # -w: a full disk costs entries, is said once, and the file stays whole
	mkdir disk
	mount -t tmpfs -o size=64k tmpfs "$T/disk" 2> mount.err ||
		skip "cannot mount: $(head -n 1 mount.err)"
	trap 'stop_proxy; umount "$T/disk"; reap' EXIT
	start_proxy -w disk/s.har
	ln -s disk/s.har s.har
	play 'it fits' <<'END'
	reply  200 | small
	ask    /a?b=c&d= = 200
	== it does not
	reply  200 | \{200000:x}
	ask    / = 200
	reply  200 | \{200000:x}
	ask    / = 200
	== after it, and once more not
	reply  200 | again
	ask    /b = 200
	reply  200 | \{200000:x}
	ask    /c = 200
END
	recorded again '"text":"small"' '/b",.*"text":"again"'
	served
	counts 1 err "^proxy: disk/s.har can't be written, exchanges are missing in it: No space left on device"
}

# ---- 21. Trace --------------------------------------------------------------

test_trace_long() { # -v: lines longer than the trace's own, with blanks before a colon
	start_proxy -v
	blanks=$(printf '%1100s' '')
	plain_origin
	play 'from a client' <<END
	ask    / Authorization$blanks: x = 400
	err~   ^#[0-9]+ c> Authorization: \*\*\*$
	== from a server
	origin head ; send HTTP/1.1 200 OK\nProxy-Authorization$blanks: x\n\n
	ask    /
	err~   ^#[0-9]+ s> Proxy-Authorization: \*\*\*$
	== a line of 3,000 bytes
	origin head
	origin send HTTP/1.1 200 OK\nContent-Length: 2\nX: $(printf '%3000s' '' | tr ' ' x)\n\nok
	ask    / = 200
	err~   ^#[0-9]+ s> X: x+$
END
}

test_trace() { # -v: four heads, credentials masked, no colour in a file; what cannot be parsed, and what ended it
	start_proxy -v
	play 'four heads' <<'END'
	reply  200 X-From: origin | secret
	ask    / X-From: client\nAuthorization: Basic c2VjcmV0MQ==\nProxy-Authorization: Basic c2VjcmV0Mg==
	err~   GET http://%O/ HTTP/1.1
	err~   X-From: client
	err~   GET / HTTP/1.1
	err~   X-From: client
	err~   HTTP/1.1 200 OK
	err~   X-From: origin
	err~   HTTP/1.1 200 OK
	err~   X-From: origin
	err#   2 X-From: client
	err#   2 X-From: origin
	err~   RELAY|[Rr]elay
	err!~  c2VjcmV0
	err!~  secret
	err#   2 [^-]Authorization: [^c]*$
	== logins in URLs
	reply  302 Location: ftp://me:pw3cret@h/?x=a@b\nLink: <http://me:pw3cret@h/>, <http://pw3cret@h>
	ask    / Referer: http://me:pw3cret@h/a://b/c@d = 302
	sees   Location: ftp://me:pw3cret@h/?x=a@b
	gets   Referer: http://me:pw3cret@h/a://b/c@d
	err~   c> Referer: http://[*]+@h/a://b/c@d$
	err~   s> Location: ftp://[*]+@h/[?]x=a@b$
	err~   >c Link: <http://[*]+@h/>, <http://[*]+@h>$
	err!~  pw3cret
	log    302 0 "h/a
END
	lacks err "$(printf '\033')"
	counts 4 log ''
	lacks err "Basic *c2V"
	play 'no request' <<'END'
	client send GET /a b HTTP/1.1\nHost: x\n\n ; answer
	sees~  ^HTTP/1.1 400
	err~   ^#[0-9]+ c> GET /a b HTTP/1\.1$
	err~   refused: the request line is not METHOD URL HTTP/1\.1$
	err~   ^#[0-9]+ \* [0-9]+ ms ended: done, 400, 0 bytes up, [0-9]+ down, the request line is not METHOD URL HTTP/1.1$
	log    "GET /a b HTTP/1.1" 400
	== no response
	origin head ; send HELO there\n\n
	ask    /
	err~   ^#[0-9]+ s> HELO there$
	err~   ^#[0-9]+ \* [0-9]+ ms ended: done, 502,
	== times to the end
	reply  200 Content-Length: 2 | o
	origin stall 150 ; send k
	ask    /
	err~   \* ([6-9][0-9]|[1-9][0-9][0-9]+) ms relay -> request,
	err~   \* ([6-9][0-9]|[1-9][0-9][0-9]+) ms ended: done, 200, 0 bytes up, 2 down$
END
}

test_trace_dump() { # -vv: payload too, bounded
	start_proxy -vv
	play 'dump' <<'END'
	origin head ; want 4 ; say 200 Content-Length: 1000004 | \x00\x1b[m
	origin fill 1000000
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 4\n\nhell
	client until \n\n ; want 4 ; skip 1000000
	err~   68 *65 *6[cC] *6[cC].*hell
	err~   00 *1[bB] *5[bB] *6[dD]
END
	[ "$(wc -c < err)" -lt 4000000 ] || fail "the dump has no bounds"
	lacks err "$(printf '\033')"
}

test_trace_change() { # the trace shows which lines of a head were dropped or added, and why
	printf '%s\n' 'set request X-Set yes' 'unset request X-Gone' > rules
	start_proxy -v -f rules -c "$T/cache"
	play -n 'a request and its response' <<'END'
	reply  200 Cache-Control: max-age=0\nETag: "a"\nKeep-Alive: 5 | ok
	reply  304 ETag: "a"
	ask    /a X-Named: 1\nX-Gone: 1\nX-Stays: 1\nConnection: X-Named\nProxy-Authorization: Basic c2VjcmV0 = 200
	err~   c> GET http://%O/a HTTP/1.1
	err~   >s - GET http://%O/a HTTP/1.1
	err+~  >s [+] GET /a HTTP/1.1  [(]the form for the next hop, RFC 9112 3.2[)]
	err~   >s - X-Named: 1  [(]named in Connection, RFC 9110 7.6.1[)]
	err~   >s - X-Gone: 1  [(]rule rules:2[)]
	err~   >s - Connection: X-Named  [(]hop-by-hop, RFC 9110 7.6.1[)]
	err~   >s - Proxy-Authorization: [*][*][*]  [(]for this proxy, RFC 9110 11.7.2[)]
	err~   >s X-Stays: 1$
	err~   >s [+] X-Set: yes  [(]rule rules:1[)]
	err~   >s [+] Via: .*RFC 9110 7.6.3
	err~   waits for the head of the response
	err~   >c HTTP/1.1 200 OK$
	err~   >c - Keep-Alive: 5
	err~   >c ETag: "a"
	err~   >c [+] Date: .*RFC 9110 6.6.1
	err~   >c [+] Cache-Status: .*RFC 9211
	err!~  c2VjcmV0
	ask    /a = 200
	err~   >s [+] If-None-Match: "a"  [(]validator of the entry, RFC 9111 4.3.1[)]
	err~   s> HTTP/1.1 304
	err~   >c HTTP/1.1 200 OK
	err~   >c [+] Age: 0  [(]the age now, RFC 9111 5.1[)]
	== nothing goes or comes without a reason
	reply  200 | ok
	client send GET http://%O/b HTTP/1.0\nExpect: 100-continue\nHTTP2-Settings: x\nProxy-Authentication-Info: x\n\n ; answer
	err~   >s - Expect: 100-continue  [(]not of HTTP/1.0, RFC 9110 10.1.1[)]
	err~   >s - HTTP2-Settings: x  [(]hop-by-hop, RFC 7540 3.2.1[)]
	err~   >s - Proxy-Authentication-Info: x  [(]not of this hop, RFC 9110 11.7.3[)]
	== nor does what is added
	reply  200 | ok
	ask    /c TE: trailers, deflate
	err~   >s [+] TE: trailers  [(]hop-by-hop, RFC 9110 10.1.4[)]
	err!~  >[sc] [-+] [^ ]*: .*[^)]$
	== a response that is not stored, but well
	reply  200 | ok
	ask    /b = 200
	err~   not stored: no-lifetime
	err+~  the fetch ends without an entry
END
	lacks err '.\{101\}'
}

test_trace_folded() { # the trace shows no part of a folded Authorization
	start_proxy -v
	client c <<'END'
send GET http://127.0.0.1:1/ HTTP/1.1\nHost: x\nAuthorization: Basic\n c2VjcmV0\n\tbW9yZQ==\nX: shown\n\n
eof
END
	has err "ended:"
	grep -e c2VjcmV0 -e bW9yZQ err && fail "a credential is shown"
	has err 'X: shown'
	for line in 'Proxy-Authorization Basic c2VjcmV0' \
	    '\x0bauthorization: Basic c2VjcmV0' 'Authorization\x0b: Basic c2VjcmV0' \
	    'X: y\rProxy-Authorization: Basic c2VjcmV0'; do
		play "$line" <<END
		client send GET http://a/ HTTP/1.1\nHost: x\n$line\nY: shown\n\n ; answer
		sees~  ^HTTP/1.1 400
		err~   Y: shown
END
	done
	play 'in the place of a request line' <<'END'
	client send Proxy-Authorization: Basic c2VjcmV0\n\n ; answer
	sees~  ^HTTP/1.1 400
	log    "Proxy-Authorization:[ *]*" 400
END
	cat log err > both
	lacks both c2VjcmV0
}

test_trace_pipe() { # words on a pipe that nobody reads: serving goes on, TERM works
	pipe_open words
	"$proxy_bin" -v -l "$T/p.sock" -o "$T/log" 2> words 9>&- &
	proxy_pid=$!
	echo "$proxy_pid" >> .proxies
	wait_for 10 '[ -S p.sock ]' || fail "does not start"
	patience 3000
	n=0
	while [ $((n += 1)) -le 25 ]; do
		client c "$T/p.sock" <<'END'
send GET /\{3000:0} HTTP/1.1\nHost: x\nX-A: \{3000:0}\nConnection: close\n\n
eof
END
		[ "$(cat c.end)" = eof ] || fail "request $n: $(cat c.end)"
	done
	served "$T/p.sock" 9>&-
	for n in 1 2 3 4 5 6 7 8 9 10; do
		kill -USR1 "$proxy_pid"
	done
	served "$T/p.sock" 9>&-
	stop_proxy
	exec 9>&-
}

# ---- 22. Heads and pages: what the proxy writes -----------------------------

test_fields_kept() { # hop-by-hop and nominated fields go; order, case and repeats stay; Host is from the URL
	play 'both ways' <<'END'
	reply  200 X-Keep: 1\nConnection: x-hop, close\nX-Hop: 2\nX-Hopper: 3\nKeep-Alive: timeout=5\nProxy-Connection: close\nUpgrade: h2c\nProxy-Authentication-Info: x | ok
	ask    / X-Hop: 1\nConnection: ,, x-HOP ,X-Other\nConnection: keep-alive\nX-OTHER: 1\nX-Hopper: 3\nX-Hop: 4\nKeep-Alive: timeout=5\nProxy-Connection: keep-alive\nProxy-Authorization: Basic c2VjcmV0\nTE: gzip\nUpgrade: h2c
	sees   X-Keep: 1
	sees   X-Hopper: 3
	sees   ok
	sees!~ ^(X-Hop|Keep-Alive|Proxy-Connection|Upgrade):
	sees!~ ^Connection:.*[xX]-[hH]op
	gets   X-Hopper: 3
	gets!~ ^([Xx]-(HOP|Hop|OTHER|Other)|Keep-Alive|Proxy-|Connection|Upgrade|TE):
	== a nomination cannot remove what frames or routes
	origin head ; want 5
	origin say 200 Connection: content-length, Date, Via | ok
	client send POST http://%O/ HTTP/1.1\nConnection: Content-Length, Host, Via\nHost: %O\nContent-Length: 5\n\nhello
	client answer
	sees   HTTP/1.1 200 OK
	sees   Content-Length: 2
	sees   Via: 1.1 proxy-ID
	sees   ok
	gets   Host: %O
	gets   Content-Length: 5
	gets   Via: 1.1 proxy-ID
	gets   hello
	== nor the coding
	origin head ; until \n0\n\n
	origin say 200 Connection: transfer-encoding\nTransfer-Encoding: chunked | 2\nok\n0\n\n
	client send POST http://%O/ HTTP/1.1\nConnection: Transfer-Encoding\nHost: %O\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n
	client answer
	sees   Transfer-Encoding: chunked
	sees   ok
	gets   Transfer-Encoding: chunked
	gets   hello
	== TE: trailers may pass, with a Connection field of our own
	reply  200 | ok
	ask    / TE: gzip, trailers\nConnection: TE = 200 | ok
	gets   GET / HTTP/1.1
	gets!~ ^TE:.*gzip
	== both ways
	reply  200 set-cookie: a=1\nX-B: x, y\nSet-Cookie: b=2\nsEt-cOOkie: a=1 | ok
	client send GET http://%O/ HTTP/1.1\nuser-agent: x\nCookie: a\nHOST: %O\nX-b: 1\nCookie: b\nx-B: "q, \\"r"\nX-b: 1\n\n
	client answer
	sees   set-cookie: a=1
	sees+  X-B: x, y
	sees+  Set-Cookie: b=2
	sees+  sEt-cOOkie: a=1
	gets~  ^[Hh][Oo][Ss][Tt]: %O$
	gets+  user-agent: x
	gets+  Cookie: a
	gets+  X-b: 1
	gets+  Cookie: b
	gets+  x-B: "q, \"r"
	gets+  X-b: 1
	gets#  1 ^[Hh][Oo][Ss][Tt]:
	== a lying Host field
	reply  200 | ok
	client send GET http://%O/ HTTP/1.1\nHost: other.example:81\n\n ; answer
	sees   HTTP/1.1 200 OK
	gets   GET / HTTP/1.1
	gets+  Host: %O
	gets#  1 ^Host:
END
}

test_fields_via() { # Via is appended both ways; our own in it is a loop
	play 'appended' <<'END'
	reply  200 Via: 1.0 ricky, 1.1 ethel | ok
	ask    / Via: 1.0 fred\nX-A: 1\nVia: 1.1 proxy-0000000 (proxy-00000000)
	sees   Via: 1.0 ricky, 1.1 ethel
	sees   Via: 1.1 proxy-ID
	gets   Via: 1.0 fred
	gets   Via: 1.1 proxy-0000000 (proxy-ID)
	gets   Via: 1.1 proxy-ID
END
	pseudonym=$(sed -n 's/^Via: 1.1 \(proxy-[0-9a-f]*\).*$/\1/p' c1)
	has o1.1 "Via: 1.1 $pseudonym"
	play 'loop' <<END
	reply  200 | no
	ask    / Via: 1.0 fred\nVia: 1.1 ricky,1.1 $pseudonym (x), 1.1 y = 508 Loop Detected error=proxy_loop_detected
	gets!~ .
	log    "GET http://%O/ HTTP/1.1" 508 .* why="
	== another proxy of this kind is no loop
	reply  200 | ok
	ask    / Via: 1.1 proxy-0123abcd = 200 OK
END
}

test_fields_anonymous() { # -a: nothing about the client or the proxy
	start_proxy -a
	play 'dropped' <<'END'
	reply  200 | ok
	ask    / Via: 1.0 fred\nFrom: a@b\nReferer: http://x/\nUser-Agent: play\nForwarded: for=1\nX-Forwarded: for=1\nx-forwarded-for: 1\nX-Forwarded-Host: x\nX-Forwarded-Proto: x\nX-Real-IP: 1\nClient-IP: 1\nX-Keep: 1\nAccept: */*\nAuthorization: Basic eDp5 = 200 OK
	gets   GET / HTTP/1.1
	gets+  Host: %O
	gets+  X-Keep: 1
	gets+  Accept: */*
	gets+  Authorization: Basic eDp5
	gets!~ ^(Via|From|Referer|User-Agent|Forwarded|[Xx]-[Ff]orw.*|X-Real-IP|Client-IP):
END
}

test_fields_anonymous_trailers() { # -a: trailers tell nothing about the client either
	start_proxy -a
	play 'personal fields as trailers' <<'END'
	origin head ; until \n0\n ; until \n ; stall 50 ; say 200 | ok
	ask    POST / Connection: X-Priv\nTransfer-Encoding: chunked | 4\ngood\n0\nX-Forwarded-For: 10.1.2.3\nx-forwarded-host: x\nFrom: me@x\nForwarded: for=1\nReferer: http://x/\nUser-Agent: play\nVia: 1.0 fred\nX-Real-IP: 1\nClient-IP: 1\n\n = 200
	gets   good
	gets!~ ^(Via|From|Referer|User-Agent|Forwarded|[Xx]-[Ff]orw.*|X-Real-IP|Client-IP):
END
	stop_proxy
	play 'without -a, too: what routes or sets conditions' <<'END'
	origin head ; until \n0\n ; until \n ; stall 50 ; say 200 | ok
	ask    POST / Transfer-Encoding: chunked | 4\ngood\n0\nIf-Match: x\nIf-None-Match: x\nForwarded: for=1\nX-Forwarded-For: 10.1.2.3\n\n = 200
	gets   good
	gets!~ ^(If-.*|Forwarded|X-Forwarded-For):
END
}

test_pages() { # what the proxy says about itself
	play 'the pages' <<'END'
	ask    here /
	ask    here HEAD /
	client quiet 100
	ask    here /proxy.pac
	ask    here /none
	client send POST / HTTP/1.1\nHost: %P\nContent-Length: 2\n\nhi ; eof
	sees   HTTP/1.1 200 OK
	sees~  ^Content-Type: text/plain; charset=utf-8
	sees~  http://%P
	sees   HTTP/1.1 200 OK
	sees~  ^Content-Type: application/x-ns-proxy-autoconfig
	sees~  FindProxyForURL
	sees~  PROXY %P
	sees~  ^HTTP/1.1 404
	sees~  ^HTTP/1.1 405
	sees~  ^Allow: GET, ?HEAD
	log    "GET / HTTP/1.1" 200 [1-9][0-9]* .* server=- end=done$
	log    "HEAD / HTTP/1.1" 200 0
	log    "GET /proxy.pac HTTP/1.1" 200
	log    "GET /none HTTP/1.1" 404
	log    "POST / HTTP/1.1" 405
	== for browsers, with links
	client send GET / HTTP/1.1\nHost: %P\nAccept: text/html,*/*;q=0.8\n\n ; answer
	sees~  ^Content-Type: text/html; charset=utf-8
	sees~  <a href=/status>.*<a href=/metrics>
END
	play 'under the name localhost' <<END
	client send GET / HTTP/1.1\nHost: localhost:${proxy##*:}\n\n ; answer
	sees   HTTP/1.1 200 OK
	== nothing unescaped comes back
	ask    here /<script>alert(1)</script>?"><b> = 40[04]
	sees!~ (<script>|<b>)
END
	for host in other.example 127.0.0.1 "127.0.0.1:1" \
	    "evil.$proxy" "$proxy.evil"; do
		play "$host is not us" <<END
		client send GET // HTTP/1.1\nHost: $host\n\n ; answer
		sees~  ^HTTP/1.1 400
		sees~  ^400 Bad Request: .
		log    "GET // HTTP/1.1" 400 .* why="
END
	done
	refused 400 'GET / HTTP/1.1\n\n'
	refused 400 'POST /x HTTP/1.1\nHost: other.example\nContent-Length: 4\n\nevil'
}

test_pages_status() { # what is under way and what has ended, as text and as HTML
	play 'as text' <<'END'
	origin eof
	a: ask CONNECT %O
	a: touch open ; await close
	do comes open
	ask    here /status
	do touch close
	sees~  ^Content-Type: text/plain; charset=utf-8
	sees~  ^proxy [0-9]
	sees~  ^  listening on %P
	sees~  ^  connections 2 of 1000, at most 2 so far
	sees~  ^Under way
	sees~  ^  #1 relay, waits for the client to send or the server to send, [0-9.]* s, [0-9.:]* CONNECT %O 200, up 0, down 0, server %O
	sees!  GET /status
	== what has ended, the last first
	reply  200 | ok
	a: ask /old = 200
	a: send GET http://u:secret@%O/ HTTP/1.1\nHost: %O\n\n ; answer ; touch asked
	do comes asked
	ask    here /status
	sees~  ^  exchanges 0 hit, [0-9]* miss, 1 tunnel, 1 local, 0 refused, 0 failed
	sees!~ secret
	sees~  ^Ended, the latest first
	sees~  ^  #[0-9]* done [0-9.]* s, [0-9.:]* GET http://%O/old 200, up 0, down 2, server %O
	sees~  CONNECT 127.0.0.1:[0-9]* 200
	sees~  GET /status 200
	== HTML, in which nothing of a request is markup
	client send GET /x<b>&"y HTTP/1.1\nHost: %P\n\n ; answer
	client send GET /status HTTP/1.1\nHost: %P\nAccept: text/html,*/*;q=0.8\n\n ; answer
	sees~  ^Content-Type: text/html; charset=utf-8
	sees~  <meta http-equiv=refresh content=2>
	sees~  GET /x&lt;b&gt;&amp;"y
	sees!~ (<script|<b>)
	== and HEAD
	ask    here HEAD /status = 200
	== not by way of a request through the proxy
	ask    http://%P/status = 508
END
}

test_pages_status_full() { # more exchanges than the page has room for are counted
	start_proxy -m 600
	many 500 all 'send GET http://x/\nHost: x'
	play -n 'the page' <<'END'
	ask    here /status
	sees~  ^  connections 501 of 600
	sees~  ^  and [0-9]* more
	client send GET /status HTTP/1.1\nHost: %P\nAccept: text/html\n\n ; answer
	sees~  ^<p>and [0-9]* more</p>
END
	: > all.over
}

test_pages_metrics() { # metrics as Prometheus reads them
	start_cache
	play -n 'some traffic' <<'END'
	reply  200 Cache-Control: max-age=60 | hello
	ask    /a = 200
	ask    /a = 200
	ask    http://127.0.0.1:1/ = 502
	== another that fails
	ask    CONNECT 127.0.0.1:1 = 502
	== one that is wrong
	client send GET no HTTP/1.1\n\n ; eof
	sees~  ^HTTP/1.1 400
	== the metrics
	ask    here /metrics
	sees~  ^Content-Type: text/plain; version=0.0.4; charset=utf-8
	sees~  ^proxy_exchanges_total.result="hit".  *1
	sees~  ^proxy_exchanges_total.result="miss".  *[1-9]
	sees~  ^proxy_exchanges_total.result="refused". [1-9]
	sees~  ^proxy_exchanges_total.result="failed". [1-9]
	sees~  ^proxy_bytes_total.side="server",direction="received". [1-9]
	sees~  ^proxy_first_byte_seconds_bucket.le="[+]Inf". [1-9]
	sees~  ^proxy_first_byte_seconds_count [1-9]
	sees~  ^proxy_refusals_total.error="connection_refused". [1-9]
END
	# Monitors know them by these names.
	client names 'ask here /metrics'
	for name in bytes_total build_info cache_bytes cache_evictions_total \
	    connections connections_limit connections_most denials_total \
	    descriptors exchanges_total first_byte_seconds log_lines_lost_total \
	    lookup_failures_total lookups_total refusals_total uptime_seconds; do
		has names "^# TYPE proxy_$name "
	done
	counts 16 names '^# TYPE '
	have promtool || skip "no promtool"
	client raw "send GET /metrics HTTP/1.1\\nHost: $proxy\\n\\n ; answer"
	sed '1,/^.\{0,1\}$/d' raw > page.metrics
	has page.metrics '^proxy_build_info'
	# A small buffer has no room for help, and promtool wants it.
	"$proxy_bin" -V | grep '^buffer ....$' > /dev/null && return
	promtool check metrics < page.metrics > promtool.says 2>&1 ||
		fail "promtool: $(cat promtool.says)"
	[ ! -s promtool.says ] || fail "promtool: $(cat promtool.says)"
}

test_pages_guarded() { # status and metrics are for this machine, unless a rule says more
	need_me
	start_proxy -e "allow client $me"
	play -n 'what lets in does not show' <<END
	ask    here /status = 403
	sees~  only clients on the proxy's machine may see this page
	sees~  start the proxy with: -e 'allow client $me page status metrics'
	ask    here /metrics = 403
	ask    here / = 200
	log    "GET /status HTTP/1.1" 403 .* rule=built-in:6 why=
END
	stop_proxy
	start_proxy -e "allow client $me page metrics"
	play -n 'one page' <<'END'
	ask    here /status = 403
	ask    here /metrics = 200
	ask    http://192.0.2.1/ = 403
END
	unset PEER_FROM
	stop_proxy
	echo joe:secret > users
	chmod 600 users
	start_proxy -e "users $T/users" -e 'login page status'
	play -n 'a rule can ask for a login' <<'END'
	ask    here /status = 407
	ask    here /metrics = 200
END
	stop_proxy
	start_proxy -e 'deny 450 page Status METRICS'
	play -n 'the case of a page in a rule does not count' <<'END'
	ask    here /status = 450
	ask    here /metrics = 450
END
}

# ---- 23. Exchange: changes of phase -----------------------------------------

# ---- traffic that was not asked to come ----

# Rules for an intercepting proxy that starts then: start_intercept
start_intercept() {
	start_proxy -l intercept:127.0.0.1:0 -v -e "to $1 host tls.example"
}

test_intercept_http() { # -l intercept: origin-form goes to Host; the rest as usual
	plain_origin
	start_intercept "$origin"
	play -n 'origin-form' <<'END'
	reply  200 | ok
	reply  200 | ok
	reply  200 | ok
	ask    /c = 200 | ok
	client send GET /a?b HTTP/1.1\nHost: %O\n\n ; answer
	gets~  GET /c
	gets   GET /a?b HTTP/1.1
	gets   Host: %O
	log    "GET http://%O/a\?b HTTP/1.1" 200 2 .* server=%O
	client send GET / HTTP/1.1\nHost: a b\n\n ; eof
	sees~  HTTP/1.1 400
	== OPTIONS * is for the server
	reply  200 | ok
	client send OPTIONS * HTTP/1.1\nHost: %O\n\n ; answer
	sees   ok
	gets   OPTIONS * HTTP/1.1
	== the proxy itself is no server to go to
	client send GET / HTTP/1.1\nHost: %P\n\n ; answer
	sees~  ^HTTP/1.1 508
END
}

test_intercept_refresh() { # -l intercept: what is stale meanwhile is validated in the background
	start_cache -l intercept:127.0.0.1:0
	play -n 'in the background' <<'END'
	reply  200 Cache-Control: max-age=0, stale-while-revalidate=99\nETag: "a" | one
	origin head ; touch asked ; say 304 ETag: "a"\nCache-Control: max-age=9
	client send GET /x HTTP/1.1\nHost: %O\n\n ; answer
	client send GET /x HTTP/1.1\nHost: %O\n\n ; answer
	sees~  ^Cache-Status: proxy-ID; hit
	do     comes asked
	gets~  ^GET /x
	gets~  ^If-None-Match: "a"
	log#   0 " 400 
END
}

test_intercept_tls() { # -l intercept: a TLS greeting opens a tunnel to the server it names
	origin o 'until .example ; send \x16hello ; until more ; send bye ; close'
	start_intercept "$origin"
	play -n 'a greeting' <<END
	client send $(hello tls.example) ; until hello ; send more ; until bye ; eof
	sees~  hello
	log    "CONNECT tls.example:443 HTTP/1.1" 200 .* server=$origin .*sni=tls.example
END
	lacks c1 HTTP/1.1
	greeting=$(hello tls.example 20)
	play -n 'one in two records' <<END
	client send $(printf %s "$greeting" | cut -c1-100) ; stall 200 ; send $(printf %s "$greeting" | cut -c101-) ; until hello ; send more ; until bye ; eof
	log    "CONNECT tls.example:443 HTTP/1.1" 200
END
	stop_proxy
	tls=$origin
	origin p 'head ; send HTTP/1.1 100 Continue\n\nHTTP/1.1 200 OK\n\nhello ; close'
	start_proxy -l intercept:127.0.0.1:0 -e "via http://$origin"
	play -n 'a parent that says 100 first' <<END
	client send $(hello tls.example) ; until hello ; eof
	sees~  ^hello
	log    "CONNECT tls.example:443 HTTP/1.1" 200
END
	stop_proxy
	start_intercept "$tls"
	play -n 'one without a name' <<END
	client send $(hello) ; eof
	log    400|499 .* why="intercepted TLS without the name of a server"
END
	stop_proxy
	start_proxy -l intercept:127.0.0.1:0 -e 'deny host tls.example'
	play -n 'one that is denied gets no page' <<END
	client send $(hello tls.example) ; eof
	log    "CONNECT tls.example:443 HTTP/1.1" 4.. 0 .* end=rule
END
	lacks c1 HTTP
	exits 2 -l intercept:127.0.0.1:99999
	exits 2 -l intercept:
}

# An origin, and a proxy that believes a PROXY header: start_header [OPTION...]
start_header() {
	start_proxy -l proxy:127.0.0.1:0 -v -e 'trust client 127.0.0.1' \
	    -e 'allow client 192.0.2.7 2001:db8::7' -e guard "$@"
}

test_proxy_header() { # -l proxy: the client of the header is the one of rules, log and trace
	start_header -e 'deny 451 client 192.0.2.66'
	play -n 'version 1 and a request in one packet; once a connection' <<'END'
	reply  200 | one\l
	reply  200 | two\l
	client send PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\nGET http://%O/a HTTP/1.1\nHost: x\n\n ; answer
	client send GET http://%O/b HTTP/1.1\nHost: x\n\n ; answer
	client send PROXY TCP4 192.0.2.8 192.0.2.1 4711 80\nGET http://%O/c HTTP/1.1\nHost: x\n\n ; eof
	sees~  ^one
	sees~  ^two
	sees~  HTTP/1.1 400
	gets~  GET /a
	gets!~ PROXY
	log    ^192.0.2.7 - - .*/a HTTP/1.1" 200 4
	log    ^192.0.2.7 - - .*/b HTTP/1.1" 200 4
	log    ^192.0.2.7 - - .* 400
	err~   behind the PROXY header, the client is 192.0.2.7:4711
	err#1 PROXY header
	== byte by byte, and empty lines behind it
	reply  200 | ok\l
	client chop 1 2 PROXY TCP6 2001:db8::7 ::1 4711 80\n\nGET http://%O/a HTTP/1.1\nHost: x\n\n
	client answer
	sees~  ^ok
	log    ^2001:db8::7 - - .* 200 3
	== version 2, and its request later
	reply  200 | ok\l
	client send \n\n\0\nQUIT\l\x21\x11\0\x0f\xc0\0\x02\x07\x7f\0\0\x01\x12\x67\0\x50\x04\0\0 ; stall 200
	client send GET http://%O/a HTTP/1.1\nHost: x\n\n ; answer
	sees~  ^ok
	log    ^192.0.2.7 - - .* 200 3
	err~   behind the PROXY header, the client is 192.0.2.7:4711
	== a tunnel
	origin until hello ; send bye ; close
	client send PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\nCONNECT %O HTTP/1.1\nHost: x\n\n ; head ; send hello ; until bye ; eof
	log    ^192.0.2.7 - - .*"CONNECT %O HTTP/1.1" 200 3
	== this client is denied
	client send PROXY TCP4 192.0.2.66 192.0.2.1 4711 80\nGET http://192.0.2.1/ HTTP/1.1\nHost: x\n\n ; answer
	sees   HTTP/1.1 451 Unavailable For Legal Reasons
	log    ^192.0.2.66 - - .* 451
	== this one may not use the proxy, and is told its own address
	client send PROXY TCP4 192.0.2.8 192.0.2.1 4711 80\nGET http://192.0.2.1/ HTTP/1.1\nHost: x\n\n ; answer
	sees   HTTP/1.1 403 Forbidden
	sees~  allow client 192.0.2.8
	== nor see the status
	client send PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\nGET /status HTTP/1.1\nHost: %P\n\n ; answer
	sees   HTTP/1.1 403 Forbidden
	== the sender may: LOCAL
	client send \n\n\0\nQUIT\l\x20\0\0\0GET /status HTTP/1.1\nHost: %P\n\n ; answer
	sees   HTTP/1.1 200 OK
	sees~  , 192.0.2.7:4711 GET /status
	log    ^127.0.0.1 - - .*"GET /status HTTP/1.1" 200
	== UNKNOWN, and a client on this machine
	reply  200 | ok\l
	reply  200 | ok\l
	client send PROXY UNKNOWN\nGET http://%O/a HTTP/1.1\nHost: x\n\n ; answer
	a:     client send PROXY TCP4 127.0.0.9 127.0.0.1 4711 80\nGET http://%O/b HTTP/1.1\nHost: x\n\n ; answer
	a:     sees~ ^ok
	sees~  ^ok
	log    ^127.0.0.1 - - .*/a HTTP/1.1" 200
	log    ^127.0.0.9 - - .*/b HTTP/1.1" 200
END
}

test_proxy_header_limit() { # -l proxy: a limit for each client is one for those of the headers
	start_header -e 'limit 1 host 127.0.0.1'
	play -n 'one at once for each of two' <<'END'
	origin head ; touch asked ; await asked2 ; say 200 | ok\l
	origin next
	origin head ; touch asked2 ; say 200 | ok\l
	a:     client send PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\nGET http://%O/a HTTP/1.1\nHost: x\n\n ; answer
	a:     sees~ ^ok
	do     comes asked
	client send PROXY TCP4 192.0.2.7 192.0.2.1 4712 80\nGET http://%O/a HTTP/1.1\nHost: x\n\n ; answer
	sees   HTTP/1.1 503 Service Unavailable
	b:     client send PROXY TCP6 2001:db8::7 ::1 4711 80\nGET http://%O/a HTTP/1.1\nHost: x\n\n ; answer
	b:     sees~ ^ok
END
}

test_proxy_header_refused() { # -l proxy: what does not begin with a right header is closed and said
	quick
	start_header
	play -n 'no header' <<'END'
	client send GET http://127.0.0.1/ HTTP/1.1\nHost: x\n\n ; eof
	sees#1 .
	log    ^127.0.0.1 - - .* 499 0 .* dns=- connect=- .* end=client why="a PROXY header was expected"$
	log#1 .
	== a wrong line
	client send PROXY TCP4 192.0.2.7 192.0.2.1 99999 80\nGET http://127.0.0.1/ HTTP/1.1\n ; eof
	sees#1 .
	log    ^127.0.0.1 .* end=client why="a malformed line in a PROXY header"$
	== a version to come
	client send \n\n\0\nQUIT\l\x31\x11\0\x0c ; eof
	log    why="unknown PROXY version or command"$
	== UDP
	client send \n\n\0\nQUIT\l\x21\x12\0\x0c ; eof
	log    why="a PROXY header that is not for TCP"$
	== no room for the addresses
	client send \n\n\0\nQUIT\l\x21\x21\0\x0c ; eof
	log    why="a PROXY header without an address"$
	== too long
	client send \n\n\0\nQUIT\l\x21\x11\xff\xff ; eof
	log    why="the PROXY header is too long"$
	== a line too long
	client send PROXY UNKNOWN \{93:x} ; eof
	log    why="the PROXY header is too long"$
	== its end is missing
	client send PROXY TCP4 192.0.2.7 ; shut ; eof
	log    end=client why="the PROXY header was cut short"$
	== it is late
	client send PROXY TCP4 192.0.2.7 ; eof
	sees#1 .
	log    end=idle why="no PROXY header in time"$
	== it never comes
	a: eof
	do wait_for 5 'kill -USR1 "$proxy_pid"; grep "request, waits for a PROXY header, " err'
	log    end=idle why="no PROXY header in time"$
	== nor does the request
	client send PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\n ; eof
	log#0 .
	== or only its beginning
	client send PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\nGET ; eof
	sees~  HTTP/1.1 408
	log    ^192.0.2.7 - - .* 408
	== somebody looks whether the port is open
	client close
	log#0 .
END
}

test_proxy_header_trust() { # a PROXY header is believed only from whom a rule trusts
	start_proxy -l proxy:127.0.0.1:0 -e 'allow' -e 'trust client 192.0.2.0/24'
	for header in 'PROXY TCP4 192.0.2.7 192.0.2.1 4711 80' 'PROXY UNKNOWN' ''; do
		play -n "not from here: $header" <<END
	client send $header\nGET http://192.0.2.1/ HTTP/1.1\nHost: x\n\n ; eof
	sees#1 .
	log    ^127.0.0.1 - - .* 444 0 .* end=rule why="no rule trusts this PROXY header"$
	log#1 .
END
	done
	# New rules count for new connections.
	stop_proxy
	echo 'trust client 192.0.2.7' > rules
	start_proxy -l proxy:127.0.0.1:0 -f rules
	plain_origin
	echo 'trust client local' > rules
	kill -HUP "$proxy_pid"
	wait_for 5 'client h "send PROXY UNKNOWN\nGET http://%O/ HTTP/1.1\nHost: x\n\n ; answer"
		grep "^HTTP/1.1 200" h > /dev/null' || fail "after HUP: $(tail -n 1 log)"
}

test_proxy_header_far() { # a loopback address in a header from elsewhere is not this machine
	need_me
	start_proxy -l "proxy:$me:0" -e "trust client $me"
	play -n 'it is, from here' <<'END'
	client send PROXY TCP4 127.0.0.9 127.0.0.1 4711 80\nGET http://127.0.0.1:1/ HTTP/1.1\nHost: x\n\n ; answer
	sees~  HTTP/1.1 502
END
	stop_proxy
	start_proxy -l proxy:127.0.0.1:0 -e "trust client $me"
	play -n 'but not from there' <<'END'
	client send PROXY TCP4 127.0.0.9 127.0.0.1 4711 80\nGET http://127.0.0.1:1/ HTTP/1.1\nHost: x\n\n ; answer
	sees~  HTTP/1.1 403
	log    ^127.0.0.9 - - .* 403
END
}

test_proxy_header_listens() { # -l proxy: with a name, IPv6, a path, beside a plain one
	start_proxy -l 127.0.0.1:0 -l proxy:localhost:0 -l "proxy:$T/s" \
	    -e 'trust client local'
	plain_origin
	want 200 GET http://%O/
	sed -n 's/^proxy: listening on //p' err > where
	[ "$(wc -l < where)" -ge 3 ] || fail "listens on $(cat where)"
	has err "curl -x http://$proxy "
	sed 1d where | while read -r at; do
		client l "$at" <<'END'
send PROXY TCP4 127.0.0.9 127.0.0.1 4711 80\nGET http://%O/ HTTP/1.1\nHost: x\n\n ; answer
END
		has l '^HTTP/1.1 200'
		last_line '^127.0.0.9 - - .* 200'
	done
	stop_proxy
	for listen in 0 :0 '*:0'; do
		start_proxy -l "proxy:$listen"
		lacks err 'curl -x'
		stop_proxy
	done
	exits 2 -l proxy:127.0.0.1:99999
	exits 2 -l proxy:
	have_ipv6 || return 0
	start_proxy -l 'proxy:[::1]:0' -e 'trust client ::1'
	client l 'send PROXY TCP6 2001:db8::7 ::1 4711 80\nGET http://192.0.2.1/ HTTP/1.1\nHost: x\n\n ; answer'
	last_line '^2001:db8::7 - - .* 403'
}

# ---- limits ----

test_limit_silence_last() { # -t: a response whose last bytes could not be sent does not look complete
	our_names
	start_proxy -t 1
	play -n 'the end of the connection is the end of the body' <<'END'
	origin head ; touch peers-halted ; send HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n3\none\n0\n\n ; eof
	client send GET http://%O/ HTTP/1.0\n\n ; eof
	sees~  ^-- end reset
	log    200 3 .* end=idle
END
}

test_limit_silence_stale() { # -t: a stale response in place of one that is late ends well
	start_cache -t 1
	play -n 'stale' <<'END'
	reply  200 Cache-Control: max-age=0, stale-if-error=99\nETag: "a" | one
	origin head ; eof
	ask    / = 200 | one
	ask    / = 200 | one
	log    200 3 .* end=done
	log    200 3 .* hit=stale .* end=done
END
}

test_limit_silence() { # -t: what is silent for too long, and what only is slow
	start_proxy -t 1 -v
	play 'no answer' <<'END'
	origin head ; eof
	ask    / = 504 Gateway Timeout error=http_response_timeout
	gets   GET / HTTP/1.1
	gets~  ^-- end (eof|reset)
	log    "GET http://%O/ HTTP/1.1" 504 .* server=%O end=[a-z]* why="
	err!~  response -> response
	== an answer that is too slow
	origin head
	origin chop 1 100 HTTP/1.1 200 OK\nX-A: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
	ask    / = 504 Gateway Timeout
	gets~  ^-- end
	== a body of a response
	reply  200 Content-Length: 10 | hello
	origin eof
	ask    / = 200 cut | hello
	gets~  ^-- end (eof|reset)
	log    200 5 .* end=idle
	== a body of a request
	origin head ; eof
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 10\n\nhello
	client eof
	sees~  ^-- end (eof|reset)
	gets   hello
	gets~  ^-- end (eof|reset)
	log    "POST http://%O/ HTTP/1.1" 408 .* up=5 .* why="
	== a server that stops reading
	origin head ; stall 4000
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 100000000\n\n
	client stuff 100000000 ; answer
	sees   HTTP/1.1 504 Gateway Timeout
	sees~  error=connection_write_timeout
	log    504 .* end=idle .*why="the server stopped reading the request"
	err~   out of time, waits for the server to send or the server to receive
	== a client that stops reading
	origin head ; send HTTP/1.1 200 OK\nContent-Length: 100000000\n\n ; stuff 100000000
	client send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; until \n\n
	client stall 2500 ; eof
	log    200 [0-9]* .* end=idle .*why="the client stopped reading the answer"
	err~   out of time, waits for the client to receive$
	== an idle tunnel
	origin want 4 ; eof
	ask    CONNECT %O = 200
	client send ping ; eof
	sees~  ^-- end (eof|reset)
	gets   ping
	gets~  ^-- end (eof|reset)
	log    "CONNECT %O HTTP/1.1" 200 0 .* up=4 .* end=idle
	== a half-closed one gets no longer
	origin eof ; stall 60000
	ask    CONNECT %O = 200
	client shut ; eof
	sees~  ^-- end (eof|reset)
	log    "CONNECT %O HTTP/1.1" 200 0 .* end=limit
	== one whose client does not read: a reset shows that bytes are missing
	origin stuff 100000000
	client send CONNECT %O HTTP/1.1\nHost: %O\n\n ; until \n\n
	client stall 2500 ; eof
	sees~  ^-- end reset
	log    "CONNECT %O HTTP/1.1" 200 [0-9]+ .* end=idle
	err~   out of time, waits for the client to send or the client to receive
	== a tunnel that is alive is not closed
	origin want 40 ; send pong ; eof
	ask    CONNECT %O
	client chop 4 300 \{10:ping} ; until pong
	sees   pong
	log    "CONNECT %O HTTP/1.1" 200 4 .* up=40 .* end=client
END
}

test_limit_times() { # heads, kept connections and half-closed tunnels have limits of their own
	quick
	play 'a kept client' <<'END'
	reply  200 | ok
	ask    / = 200 | ok
	client eof
	sees+~ ^-- end (eof|reset)
	sees#  1 ^HTTP/
	log#   1 .
	log    200 2 .* end=done$
	== a kept server
	reply  200 | ok
	origin eof
	ask    / = 200 | ok
	gets   GET / HTTP/1.1
	gets   -- end eof
	== a tunnel, half-closed, then silent
	origin eof ; stall 60000
	ask    CONNECT %O = 200
	client shut ; eof
	sees~  ^-- end (eof|reset)
	log    "CONNECT %O HTTP/1.1" 200 0 .* end=limit
	== a head, too slow, though never silent
	client chop 1 50 GET http://a/aaaaaaaaaaaaaaaaaaaa ; eof
	sees~  ^HTTP/1.1 408
	sees~  ^Connection: close
	sees~  ^-- end (eof|reset)
	log    "(- )?GET[^"]*" 408 .* why="
	== the second head on a connection
	reply  200 | ok
	ask    / = 200 OK
	client send GET http://%O/ HT ; eof
	sees~  HTTP/1.1 408
	log    200
	log    408 .* why="
	== a client that never says a word
	client eof
	sees~  ^-- end (eof|reset)
	== nor after an empty line in two pieces: nothing is said either
	client send \r ; stall 150 ; send \l ; eof
	sees~  ^-- end (eof|reset)
	sees!~ HTTP
END
	kill -0 "$proxy_pid" || fail "the proxy is gone"
}

test_limit_connect_time() { # no connection in time: 504
	quick
	deaf
	play 'GET' <<'END'
	ask    / = 504 Gateway Timeout error=connection_timeout
	sees~  %O
	log    "GET http://%O/ HTTP/1.1" 504 .* end=[a-z]* why="
END
}

test_limit_unread_interim() { # interim answers that nobody reads: no spinning
	quick
	start_proxy -l "$T/p.sock" -t 1
	play 'the client does not read' <<END
	origin head ; touch asked
	origin send \{60:HTTP/1.1 103 Early\nLink: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\nLink: \{$((room_max - 1000)):0}\n\n}
	origin eof
	a: send GET http://%O/ HTTP/1.1\nHost: %O\n\n
	a: await over
	do comes asked
	do "\$peer" sleep 200
	do rests 'all is full' 2500 12
	do wait_for 5 '[ -f o1.1.end ]' || fail "the server is never let go"
	do touch over
END
}

test_limit_linger() { # what is sent after the last answer is read while it comes, and not for ever
	quick
	start_proxy
	play -n 'longer than one wait' <<END
	reply  200 Connection: close | ok
	origin close
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 1000\n\n
	client chop 1 550 xxxx ; eof
	sees   HTTP/1.1 200 OK
	sees~  ^-- end eof
	== longer than all of them may take
	reply  200 Connection: close | ok
	origin close
	ask    POST / Content-Length: 1000 = 200 OK
	client chop 1 550 xxxxxx
	sees~  ^-- end broken chop
END
}

# ---- rules that bend an exchange ----

test_bend_answer_long() { # answer: a text that has no room in a small buffer is refused, not cut
	long=$(awk 'BEGIN { while (n++ < 8000) printf "x" }')
	start_proxy -e "answer 200 \"$long\" host a.example"
	want=502
	[ "$room_max" -lt 9000 ] || want="200 | $long"
	play 'a text of 8000 bytes' <<END
	ask    http://a.example/ = $want
END
}

test_bend_answer() { # answer: a text or a file, and no server is asked
	printf '<p>hello</p>' > page.html
	start_rules <<END
answer 200 "hello" host text.example
answer 418 application/json "{}" host json.example
answer 200 text/html file $T/page.html host file.example
answer 200 file $T/missing host missing.example
answer 204 "" host empty.example
END
	play -n 'text and file' <<'END'
	ask    http://text.example/ = 200
	sees~  ^Content-Type: text/plain; charset=utf-8
	sees   hello
	ask    HEAD http://text.example/ = 200
	ask    http://json.example/ = 418
	sees~  ^Content-Type: application/json
	sees   {}
	ask    http://file.example/ = 200
	sees~  ^Content-Type: text/html
	sees   <p>hello</p>
	ask    http://empty.example/ = 204
	ask    http://missing.example/ = 500
	sees~  No such file
	log    "GET http://text.example/ HTTP/1.1" 200 5 .* bent=.*:1$
END
	start_ruled -e 'answer 200 "hello"' -e 'set response ETag "\"a\""' \
	    -e 'unset response Content-Type'
	play -n 'response rules change it, and no other page of the proxy' <<'END'
	ask    http://text.example/ = 200
	sees   ETag: "a"
	sees   hello
	ask    here /proxy.pac = 200
	sees#  1 ^ETag: "a"$
	sees#  1 ^Content-Type: 
END
	start_ruled -f rules
	head -c 300000 /dev/zero | tr '\0' x > page.html
	play -n 'a long file, as it is now' <<'END'
	ask    http://file.example/ = 200
	sees~  ^Content-Length: 300000
	log    "GET http://file.example/ HTTP/1.1" 200 300000
END
}

test_bend_answer_stale() { # answer, hang: also where an entry was to be validated, or fetched
	start_cache -e 'deny address 192.0.2.1' -e 'answer 503 "no" field X-A a' \
	    -e 'answer 304 "" field X-A b' -e 'hang field X-A c'
	play -n 'stale' <<'END'
	reply  200 Cache-Control: max-age=0, stale-if-error=99\nETag: "a" | old
	reply  200 Cache-Control: max-age=99\nETag: "b" | new
	ask    http://localhost:%p/x = 200 | old
	ask    http://localhost:%p/x X-A: a = 503
	ask    http://localhost:%p/x X-A: b = 304
	ask    http://localhost:%p/x = 200 | new
	== nobody waits for one that hangs
	reply  200 Cache-Control: max-age=99 | y
	a: send GET http://localhost:%p/y HTTP/1.1\nHost: x\nX-A: c\n\n ; touch a ; await go
	do comes a ; "$peer" sleep 300
	ask    http://localhost:%p/y = 200 | y
	do touch go
END
	log_between total 0 5000
}

test_bend_hang() { # hang: no answer until the client goes, or -t
	start_proxy -e 'hang host a.example' -e 'delay 9s' -e 'answer 200 "a"'
	play -n 'the status page says so' <<'END'
	a: send GET http://a.example/ HTTP/1.1\nHost: a.example\n\n ; touch a ; await go
	b: send GET http://b.example/ HTTP/1.1\nHost: b.example\n\n ; touch b ; await go
	do comes a b ; "$peer" sleep 100
	ask    here /status
	do touch go
	sees~  waits for (the client to give up|the end of a delay),
	sees~  waits for (the client to give up|the end of a delay),
END
	stop_proxy
	start_proxy -t 1 -e 'hang host a.example'
	play -n 'it takes the request' <<'END'
	client send POST http://a.example/ HTTP/1.1\nHost: a.example\nContent-Length: 300000\n\n\{300000:x} ; eof
	sees~  ^-- end (eof|reset)
	log    "POST http://a.example/ HTTP/1.1" 499 0 .* end=idle .*bent=-e:1
	== the client goes
	client send GET http://a.example/ HTTP/1.1\nHost: a.example\n\n ; stall 100 ; close
	log    "GET http://a.example/ HTTP/1.1" 499 0 .* end=client
END
}

test_bend_delay() { # delay: before the head of any response, and the 200 of a tunnel
	start_rules <<'END'
delay 300ms host 127.0.0.1
delay 200ms-400ms host page.example
answer 200 "ok" host page.example
END
	plain_origin
	want 200 GET http://%O/
	log_between total 300 2000
	want 200 GET http://page.example/
	log_between total 200 2000
	start_proxy -t 1 -e 'delay 1500ms'
	plain_origin
	want 200 GET http://%O/
	log_between total 1500 4000
	start_rules <<'END'
delay 2s url /103
delay 300ms host 127.0.0.1
END
	play -n 'an interim response comes at once' <<'END'
	origin head ; say 103 Link: a ; stall 50 ; say 200 | ok
	client send GET http://%O/103 HTTP/1.1\nHost: %O\n\n ; until 103 ; until \n\n
	client quiet 500 ; answer
	sees~  ^-- end open
	== a tunnel
	origin until ping ; send pong
	client send CONNECT %O HTTP/1.1\nHost: %O\n\n ; answer head ; send ping ; until pong ; close
	sees   HTTP/1.1 200 Connection established
END
	wait_for 5 'tail -n 1 log | grep CONNECT > /dev/null' || fail "no line"
	log_between total 300 3000
	served
}

test_bend_rate() { # rate: so many bytes a second, in tunnels, too, and evenly
	start_rules <<'END'
rate 100K not method POST
rate 50K method POST
END
	play -n 'a response' <<'END'
	reply  200 | \{50000:x}
	ask    / = 200
END
	log_between total 380 1500
	play -n 'a request' <<'END'
	origin head ; want 25000 ; say 200 | ok
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 25000\n\n\{25000:x} ; answer
	sees   HTTP/1.1 200 OK
END
	log_between total 380 1500
	play -n 'a tunnel' <<'END'
	origin until go ; send \{50000:x} ; close
	client send CONNECT %O HTTP/1.1\nHost: %O\n\n ; answer head ; send go ; eof
	sees   HTTP/1.1 200 Connection established
END
	wait_for 5 'tail -n 1 log | grep CONNECT > /dev/null' || fail "no line"
	log_between total 380 1500
	before=$(processor_time)
	play -n 'waiting costs no processor time' <<'END'
	reply  200 | \{100000:x}
	ask    / = 200
END
	log_between total 850 2500
	[ $(($(processor_time) - before)) -le 30 ] || fail "it spins"
	play -n 'what it waits for is said' <<'END'
	origin until go ; send \{50000:x} ; close
	a: send CONNECT %O HTTP/1.1\nHost: %O\n\n ; answer head ; send go ; eof
	client stall 150 ; send GET /status HTTP/1.1\nHost: %P\n\n ; answer
	sees~  waits for its rate or the client to send,.* CONNECT %O .*, bent by rules:1
END
}

test_bend_limit() { # limit: so many at once for each client, else 503
	start_proxy -e 'limit 1 host 127.0.0.1'
	play -n 'one at once' <<'END'
	origin head ; touch asked ; await go ; say 200 | first
	a: ask / = 200 | first
	do comes asked
	ask    / = 503
	sees~  ^Proxy-Status: .*http_request_denied
	sees~  ^Retry-After:
	do touch go
	log    "GET http://%O/ HTTP/1.1" 503 .* bent=-e:1 why="too many
	== and again
	reply  200 | ok
	ask    / = 200
	ask    / = 200
END
	stop_proxy
	start_cache -e 'limit 1'
	play -n 'what is fetched in the background is nobody'"'"'s request' <<'END'
	reply  200 Cache-Control: max-age=0, stale-while-revalidate=99\nETag: "a" | one
	origin head ; touch again ; await over ; say 200 | two
	ask    / = 200 | one
	ask    / = 200; hit; ttl=.* | one
	client await again
	ask    / = 200; hit; ttl=.* | one
	client touch over
END
}

test_bend_limit_reload() { # limit: those that began before HUP count, whatever the new number
	start_rules <<'END'
limit 2 host 127.0.0.1
END
	play -n 'the rules are read again meanwhile' <<'END'
	origin head ; touch asked ; await go ; say 200 | first
	b: ask / = 200 | first
	do comes asked
	do printf 'answer 299 "new" url /new\nlimit  1 host 127.0.0.1\n' > rules
	do kill -HUP "$proxy_pid"
	do wait_for 5 'gives 299 http://x.example/new'
	ask    / = 503
	sees~  ^Retry-After:
	do touch go
	log    "GET http://%O/ HTTP/1.1" 503 .* bent=rules:2 why="too many
END
}

test_bend_cut() { # cut: the connection breaks after so many bytes
	start_proxy -e 'cut 1000'
	play -n 'it is cut' <<'END'
	reply  200 | \{3000:x}
	client send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; eof
	sees~  ^-- end (eof|reset)
	log    "GET http://%O/ HTTP/1.1" 200 1000 .* end=rule rule=-e:1 bent=-e:1
	== in chunks, without their end
	reply  200 Transfer-Encoding: chunked | 7d0\n\{2000:x}\n0\n\n
	client send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; eof
	sees!  0
	log    "GET http://%O/ HTTP/1.1" 200 1000 .* end=rule
	== what is short enough is whole
	reply  200 | \{1000:x}
	ask    / = 200
	log    "GET http://%O/ HTTP/1.1" 200 1000 .* end=done
END
}

test_bend_offline() { # offline: the cache alone answers, however old it is
	start_cache
	play -n 'filled' <<'END'
	reply  200 Cache-Control: max-age=0\nETag: "a" | old
	ask    /a = 200 | old
END
	old=$origin
	stop_proxy
	# It waits for no rule before it, and not for access.
	start_cache -e 'nocache type video/*' -e offline -e 'deny type a/b'
	play -n 'answered' <<END
	ask    http://$old/a = 200 | old
	ask    http://$old/b = 504
	sees~  ^504 Gateway Timeout: only the cache may answer, and
	a: ask POST http://$old/a = 504
	b: ask CONNECT $old = 504
	log    "GET http://$old/a HTTP/1.1" 200 .* hit=stale .* bent=-e:2$
	log    "GET http://$old/b HTTP/1.1" 504 .* bent=-e:2 why=
END
	run_proxy -e 'cache 1h type a/b' -e offline -T http://a.example/
	has out 'bent: offline (-e:2: offline)'
}

test_bend_to() { # to: another server, while URL, Host and cache key stay
	origin o 'head ; say 200 Cache-Control: max-age=60 | there ; loop'
	start_proxy -c "$T/cache" -e "to $origin host a.example"
	play -n 'URL and Host stay' <<'END'
	ask    http://a.example/x = 200; fwd=uri-miss; .*stored$ | there
	ask    http://a.example/x = 200; hit; ttl=[0-9]+$ | there
	a: ask CONNECT a.example:443 = 200
	log    "GET http://a.example/x HTTP/1.1" 200 .* bent=-e:1$
	log    "CONNECT a.example:443 HTTP/1.1" 200 .* bent=-e:1$
END
	grep '^GET /x HTTP/1.1' o.1 > /dev/null && grep '^Host: a.example' o.1 \
		> /dev/null || fail "the server got $(cat o.1)"
	"$proxy_bin" -e "to $origin host a.example" -T http://a.example/ > out
	has out "route: to $origin (-e:1: to"
	tries -e 'to 127.0.0.2:80 host 192.0.2.1' -e 'allow client 192.0.2.9' <<'END'
http://192.0.2.1/ client 192.0.2.9 = 1 deny built-in:1
http://192.0.2.2/ client 192.0.2.9 = 0 allow -e:2
END
	need_me
	start_proxy -e "to $origin host a.example 198.51.100.1" -e "allow client $me"
	for host in a.example 198.51.100.1; do
		play -n "the guard sees the address behind $host" <<END
		ask    http://$host/ = 403
		sees~  may go to this address
END
	done
}

test_bend_chance() { # chance: that share of requests, and the same ones with -S
	for run in 1 2 3; do
		start_proxy -S $((42 + run / 3)) -e 'answer 200 "a" chance 30%' \
		    -e 'answer 201 "b"'
		n=0
		while [ $((n += 1)) -le 100 ]; do echo "ask http://x.example/"; done |
			client c
		sed -n 's|^HTTP/1.1 \(20[01]\).*|\1|p' c > "got.$run"
		stop_proxy
	done
	cmp got.1 got.2 || fail "with one seed two runs differ"
	tail -n 99 got.1 > later
	head -n 99 got.3 | cmp -s - later &&
		fail "the next seed has the same choices, one request earlier"
	n=$(grep -c 200 got.1)
	[ "$n" -ge 15 ] && [ "$n" -le 45 ] || fail "30 % of 100 are $n"
	# The same for pages of the proxy's own.
	start_proxy -S 42 -e 'deny page status chance 50%'
	n=0
	while [ $((n += 1)) -le 40 ]; do echo "ask here /status"; done | client c
	n=$(grep -c '^HTTP/1.1 200' c)
	[ "$n" -ge 8 ] && [ "$n" -le 32 ] || fail "of 40, 50 % are not $n"
}

test_bend_trace() { # trace: as -v does, for what the rule matches
	start_proxy -e 'trace url /shown'
	play -n 'one of two' <<'END'
	reply  200 | ok
	ask    /hidden = 200
	ask    /shown = 200
	err~   c> GET http://%O/shown HTTP/1.1
	err~   >s [+] GET /shown HTTP/1.1
	err~   s> HTTP/1.1 200
	err~   >c HTTP/1.1 200
	err~   ended: done, 200
END
	lacks err hidden
}

test_bend_denied() { # what is denied is not bent, also if the server's address tells
	start_proxy -e 'deny address 127.0.0.1 ::1' \
		-e 'answer 200 "bypassed" url /a' -e 'hang url /h' -e 'cut 3'
	play -n 'denied' <<'END'
	ask    http://localhost:1/a = 403
	ask    http://localhost:1/h = 403
	ask    http://localhost:1/c = 403
	log    "GET http://localhost:1/c HTTP/1.1" 403 [0-9][0-9].* rule=-e:1 why=
END
	start_proxy -e drop -e 'to 127.0.0.1:1'
	play -n 'dropped' <<'END'
	client send GET http://a.example/ HTTP/1.1\nHost: x\n\n ; eof
	log    "GET http://a.example/ HTTP/1.1" 444 .* rule=-e:1 why=
END
}

test_bend_leader() { # a slow leader by rule does not slow those that follow it
	start_cache -e 'rate 20000 url /x field X-A rate'
	play -n 'two clients' <<'END'
	reply  200 Cache-Control: max-age=60\nETag: "a" | \{100000:x}
	a: send GET http://%O/x HTTP/1.1\nHost: %O\nX-A: rate\n\n ; touch a ; await go
	do comes a ; "$peer" sleep 300
	ask    /x = 200
	do touch go
END
	log_between total 0 1500
}

test_bend_leader_gone() { # one that has left slows nobody down, and its line says what it got
	start_cache -e 'rate 5000 field X-A rate'
	play -n 'two clients' <<'END'
	reply  200 Cache-Control: max-age=60\nTransfer-Encoding: chunked | 3E8\n\{1000:x}\n ; await go
	origin send 18A88\n\{101000:x}\n0\n\n
	a: send GET http://%O/ HTTP/1.1\nHost: %O\nX-A: rate\n\n ; until xxxx ; touch a ; await leave ; reset
	do comes a
	b: send GET http://%O/ HTTP/1.0\n\n ; until \n\n ; touch b ; want 102000 ; eof
	do comes b
	do touch go ; "$peer" sleep 300 ; touch leave
	b: ends ^eof$
	log    200 [1-9][0-9]{2,3} .* end=client
	log    200 102000 .* end=done
END
	log_between total 0 5000
}

test_bend_leader_cut() { # who follows a client that a rule cuts off gets all the same
	start_cache -e 'cut 5000 field X-A cut' -e 'deny body "abcd" field X-A deny'
	for what in 'cut length' 'cut chunks' 'deny length'; do
		rm -f a go
		framed "${what#* }" 101000
		case $what in
		*chunks) how="Transfer-Encoding: chunked | 18A88\\n\\{1000:x}" ;;
		*) how="$how | \\{1000:x}" ;;
		esac
		play -n "$what" <<END
	reply  200 Connection: close\nCache-Control: max-age=60\n$how ; await go
	origin send abcd\{99996:x} $end ; close
	reply  200 Connection: close\nContent-Length: 101000 | \{101000:x}
	a: send GET http://%O/${what% *}/${what#* } HTTP/1.0\nX-A: ${what% *}\n\n ; until xxxx ; touch a ; eof
	do comes a
	b: send GET http://%O/${what% *}/${what#* } HTTP/1.0\n\n ; touch b ; until \n\n ; want 101000 ; eof
	do comes b ; "$peer" sleep 300 ; touch go
	b: sees HTTP/1.1 200 OK
	log#   1 200 [0-9]+ .* end=rule
	log#   1 200 101000 .* end=done
END
	done
}

test_bend_connect() { # answer: no tunnel for CONNECT, and no body into a file
	echo hello > page
	start_rules <<END
answer 404 "no" method CONNECT host a.example
answer 200 "x" method CONNECT
answer 200 file $T/page method POST
answer 405 "later" method CONNECT host b.example
END
	play -n 'CONNECT' <<'END'
	origin until ping ; send pong ; close
	client send CONNECT %O HTTP/1.1\nHost: %O\n\n ; answer head ; send ping ; until pong ; eof
	a: ask CONNECT a.example:443 = 404
	b: ask CONNECT b.example:443 = 405
	sees   HTTP/1.1 200 Connection established
	== a body
	client send POST http://b.example/ HTTP/1.1\nHost: x\nContent-Length: 100000\n\n\{100000:x} ; eof
	sees   HTTP/1.1 200 OK
	log    "POST http://b.example/ HTTP/1.1" 200 6 .* up=0 .* end=done
END
	exits 0 -e 'answer 200 "x"' -e 'delay 1s' -T https://a.example/
	lacks out 'bent: answer'
	has out 'bent: delay'
	exits 1 -e 'deny host a.example' -e 'delay 1s' -T https://a.example/
	lacks out bent
}

test_bend_hang_much() { # hang: a client that sent much and left is noticed
	start_proxy -e hang
	play -n 'it leaves' <<'END'
	client send CONNECT x:443 HTTP/1.1\nHost: x\n\n\{100000:x} ; stall 300 ; close
	log    "CONNECT x:443 HTTP/1.1" 499 0 .* end=client
END
}

# ---- 24. Exchange: from the request to the server ---------------------------

# ---- parents ----

# Starts the proxy with the origin p as its parent: start_with SCHEME [LOGIN@]
# and the parent's scripts on standard input.
start_with() {
	origin p
	start_proxy -x "$1://${2-}$origin"
	parent=$origin
}

test_parent_http() { # -x http://: plain and CONNECT, nothing looked up here
	start_with http <<'END'
reply 200 | ok
reply 200 | ok
---
head ; send HTTP/1.1 200 Fine\nX-Parent: 1\n\npong ; want 4
---
reply 403 No | no
head ; say 200 | evil
---
head ; close
END
	play -n 'plain, kept; CONNECT' <<END
	ask    http://dest.invalid/a = 200 OK | ok
	ask    http://dest.invalid:81?b = 200 | ok
	client send CONNECT dest.invalid:443 HTTP/1.1\nHost: x\n\nping
	client answer head ; until pong ; shut ; eof
	sees   pong
	sees!  HTTP/1.1 200 Fine0
	log    "GET http://dest.invalid/a HTTP/1.1" 200 2 .* server=$parent end=done
	log    "GET http://dest.invalid:81\?b HTTP/1.1" 200 2 .* connect=- .* server=$parent end=done
	log    "CONNECT dest.invalid:443 HTTP/1.1" 200 4 .* up=4 .* server=$parent end=
	== CONNECT that the parent refuses: what follows is no request
	client send CONNECT dest.invalid:443 HTTP/1.1\nHost: x\n\nGET http://dest.invalid/evil HTTP/1.1\nHost: dest.invalid\n\n
	client eof
	sees~  ^HTTP/1.1 (403|502)
	sees!~ ^HTTP/1.1 200
	sees!~ evil
	sees~  ^-- end (eof|reset)
	log#   1 .
	log    "CONNECT dest.invalid:443 HTTP/1.1" (403|502)
	== a parent that closes
	ask    CONNECT dest.invalid:443 = 502
	log    "CONNECT dest.invalid:443 HTTP/1.1" 502 .* why="
END
	got p <<'END'
= GET http://dest.invalid/a HTTP/1.1
+ Host: dest.invalid
~ ^GET http://dest.invalid:81/?\?b HTTP/1.1$
+ Host: dest.invalid:81
= -- connection 2
+ CONNECT dest.invalid:443 HTTP/1.1
= Host: dest.invalid:443
= ping
!~ ^Proxy-Authorization
!~ evil
END
}

test_parent_http_login() { # -x http://user:password@: sent, wrong ones told
	start_with http 'me:s3cret%3A@' <<'END'
reply 200 | ok
---
head ; send HTTP/1.1 200 OK\n\npong
---
reply 407 No\nProxy-Authenticate: Basic realm="p" | no
END
	play -n 'right' <<'END'
	ask    http://dest.invalid/a Proxy-Authorization: Basic b3RoZXI= = 200 | ok
	ask    CONNECT dest.invalid:443 = 200 OK
	client until pong
END
	login=$(printf 'me:s3cret:' | "$peer" base64)
	got p <<END
#2 ^Proxy-Authorization:
= Proxy-Authorization: Basic $login
= Proxy-Authorization: Basic $login
END
	play -n 'wrong' <<'END'
	ask    http://dest.invalid/a = (407|502)
	ask    CONNECT dest.invalid:443 = (407|502)
	log    "GET http://dest.invalid/a HTTP/1.1" (407|502)
	log    "CONNECT dest.invalid:443 HTTP/1.1" (407|502)
END
	grep -e s3cret -e "$login" log err > /dev/null &&
		fail "the log or standard error has the password"
	have ps && ps -o args= -p "$proxy_pid" | grep s3cret > /dev/null &&
		echo "note: the password shows in ps"
}

test_parent_http_relay() { # without a login of ours the client's passes
	start_with http <<'END'
reply 407 No\nProxy-Authenticate: Basic realm="p" | no
reply 200 | ok
loop
END
	play -n 'asked, then told' <<'END'
	ask    http://dest.invalid/a = 407 No
	sees   Proxy-Authenticate: Basic realm="p"
	ask    http://dest.invalid/a Proxy-Authorization: Basic eDp5 = 200 OK
	log    "GET http://dest.invalid/a HTTP/1.1" 407 2
	log    "GET http://dest.invalid/a HTTP/1.1" 200 2
END
	got p <<'END'
#1 ^Proxy-Authorization: Basic eDp5$
END
}

test_parent_http_connection() { # a connection that a client has logged in serves no other
	start_with http <<'END'
reply 200 | alice
reply 200 | alice
---
reply 407 Proxy-Authenticate: NTLM | who
reply 200 | bob
---
reply 200 | nobody
END
	play -n 'by NTLM' <<'END'
	a: ask http://dest.invalid/ Proxy-Authorization: NTLM TlRM = 200 | alice
	a: ends open
	b: ask http://dest.invalid/ = 407
	b: ends open
	c: ask http://dest.invalid/ = 200 | nobody
END
}

test_parent_down() { # a parent that is not there: 502 that names it
	nobody
	start_proxy -x "http://$origin"
	play -n 'down' <<'END'
	ask    http://dest.invalid/ = 502 error=connection_refused
	sees~  %O
END
}

test_parent_socks() { # -x socks5://: by name, IPv4, IPv6; the reply in pieces
	start_with socks5 <<'END'
want 3 ; send \x05\0 ; want 19 ; chop 1 1 \x05\0\0\x01\x7f\0\0\x01\x12\x34
reply 200 | ok
reply 200 | ok
---
want 3 ; send \x05\0 ; want 10 ; send \x05\0\0\x03\x05a.b.c\x12\x34pong
want 4
---
want 3 ; send \x05\0 ; want 22 ; send \x05\0\0\x04\{16:\0}\x12\x34
want 4 ; send gnop
END
	play -n 'by name, kept for the same name; then numbers' <<END
	ask    http://dest.invalid/a
	ask    http://dest.invalid/b
	client send CONNECT 192.0.2.7:258 HTTP/1.1\nHost: x\n\nping
	client answer head ; until pong ; shut ; eof
	sees   HTTP/1.1 200 OK
	sees~  pong$
	log    "GET http://dest.invalid/a HTTP/1.1" 200 2 .* server=$parent end=done
	log    "GET http://dest.invalid/b HTTP/1.1" 200 2 .* connect=- .* server=$parent end=done
	log    "CONNECT 192.0.2.7:258 HTTP/1.1" 200 4 .* up=4 .* server=$parent end=
	== IPv6
	client send CONNECT [2001:db8::7]:443 HTTP/1.1\nHost: x\n\nping
	client answer head ; until gnop
	sees   gnop
END
	got p <<'END'
= -- connection 1
+ \x05\x01\x00\x05\x01\x00\x03\x0cdest.invalid\x00PGET /a HTTP/1.1
+ Host: dest.invalid
= GET /b HTTP/1.1
= -- connection 2
+ \x05\x01\x00\x05\x01\x00\x01\xc0\x00\x02\x07\x01\x02ping
= -- connection 3
+ \x05\x01\x00\x05\x01\x00\x04 \x01\r\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07\x01\xbbping
END
}

test_parent_socks_login() { # -x socks5://user:password@
	start_with socks5 'me:pw@' <<'END'
want 4 ; send \x05\x02 ; want 7 ; send \x01\0 ; want 10
send \x05\0\0\x01\0\0\0\0\0\0pong
---
want 4 ; send \x05\x02 ; want 7 ; send \x01\x01
eof
---
want 4 ; send \x05\xff ; eof
END
	play -n 'right' <<'END'
	ask    CONNECT 192.0.2.7:258
	client until pong
	sees   pong
END
	got p <<'END'
= \x05\x02\x00\x02\x01\x02me\x02pw\x05\x01\x00\x01\xc0\x00\x02\x07\x01\x02
END
	for n in wrong 'not wanted'; do
		play -n "$n" <<'END'
		ask    CONNECT 192.0.2.7:258 = 502
		log    " 502 .* why="
END
	done
}

test_parent_socks_refusals() { # each reply code of RFC 1928 gets its own words
	for code in 01 02 03 04 05 06 07 08 09 ff; do
		cat <<END
want 3 ; send \\x05\\0 ; want 10
send \\x05\\x$code\\0\\x01\\0\\0\\0\\0\\0\\0 ; eof
---
END
	done > script
	cat >> script <<'END'
want 3 ; send \x05\xff ; eof
---
want 3 ; send HTTP/1.1 400 Bad\n\n ; eof
---
want 3 ; send \x05\0 ; want 10 ; send \x05\0\0\x09\0\0\0\0\0\0
eof
---
want 3 ; close
END
	start_with socks5 < script
	for code in 01 02 03 04 05 06 07 08 09 ff method http type close; do
		play -n "reply $code" <<'END'
		ask    http://192.0.2.7:258/ = 50[24] error=
		sees~  ^50[24] [A-Z][a-z]* [A-Z][a-z]*: .
		log    " 50[24] .* server=[^ ]* end=[a-z]* why="
END
		"$peer" show < "c$plays" | grep -v ^Date > "page.$code"
	done
	for code in 02 03 04 05 06 07 08; do
		cmp page.01 page.$code > /dev/null &&
			fail "reply $code has no words of its own"
	done
	:
}

test_parent_socks_early() { # bytes behind a SOCKS reply are no answer to what was not asked yet
	start_with socks5 <<'END'
want 3 ; send \x05\0 ; want 10
send \x05\0\0\x01\0\0\0\0\0\0HTTP/1.1 200 OK\nContent-Length: 4\n\nevil
reply 200 | ok
---
want 3 ; send \x05\0 ; want 10 ; send \x05\0\0\x01\0\0\0\0\0\0220 ready\n
want 4 ; send 221 bye\n
END
	play -n 'GET' <<'END'
	ask    http://192.0.2.7:258/ = 502 Bad Gateway
	sees!~ evil
	log    "GET http://192.0.2.7:258/ HTTP/1.1" 502 .* why="
	== CONNECT: what the target says first comes through
	ask    CONNECT 192.0.2.7:258 = 200
	client until ready\n ; send QUIT ; eof
	sees   220 ready
	sees+  221 bye
	log    "CONNECT 192.0.2.7:258 HTTP/1.1" 200 20 .* up=4 .* end=server
END
}

test_parent_password_hidden() { # a parent's password is not among the proxy's arguments
	[ -z "${EMULATOR-}" ] || skip "the emulator keeps the arguments"
	start_proxy -x 'http://me:s3cret@127.0.0.1:1'
	if [ -r "/proc/$proxy_pid/cmdline" ]; then
		tr '\0' '\n' < "/proc/$proxy_pid/cmdline" > args
	else
		have ps || skip "no ps"
		ps -o args= -p "$proxy_pid" > args 2> /dev/null ||
			skip "no ps -o args"
	fi
	grep -e "-x" args > /dev/null || skip "arguments cannot be seen"
	lacks args s3cret
	served_log=$(cat log err)
	case $served_log in
	*s3cret*) fail "the banner has it" ;;
	esac
	stop_proxy
	for rule in 'http://me:s3cret@x:1' 'direct http://me:s3cret@x:1' \
	    'to http://me:s3cret@x:1' 'deny http://me:s3cret@x:1 port 1'; do
		exits 2 -n -e "$rule"
		lacks errors s3cret
	done
}

# ---- addresses ----

test_names_refused_address() { # the next address is tried when one refuses
	second_address
	start_names $second 127.0.0.1
	play 'the first refuses' <<'END'
	reply  200 | ok
	ask    http://two.test:%p/ = 200 | ok
	log    200 2 .* server=127.0.0.1:%p end=done
END
}

test_names_dead_address() { # a dead first address costs at most 300 ms
	second_address
	twins deaf deaf <<'END'
reply 200 Connection: close | ok
END
	start_names $second 127.0.0.1
	# The best of some tries: the machine may be busy.
	for n in 1 2 3 4 5 6; do
		play -n 'the second answers' <<'END'
	ask    http://two.test:%p/ = 200 | ok
END
		took=$(sed -n 's/.* connect=\([0-9]*\) .*/\1/p' log | sort -n |
		    head -n 1)
		[ "${took:-999}" -gt 300 ] || break
	done
	[ "${took:-999}" -le 300 ] || fail "connecting took ${took:-?} ms"
	has log " connect=[0-9]* .* server=$origin "
	[ "$took" -ge 100 ] || fail "the first address was not tried"
	served
}

test_names_outgoing() { # -b: the address that servers see
	export PEER_NOTES=1
	need_second_loopback
	start_proxy -b 127.0.0.2
	play 'GET and CONNECT' <<'END'
	reply  200 | ok
	origin next
	origin send ok
	ask    / = 200 | ok
	ask    CONNECT %O = 200
	client eof
	sees   ok
END
	for n in 1 2; do
		has o1.$n.peer '^127.0.0.2$'
	done
}

test_names_outgoing_fails() { # -b: the refusal says that no port is left there, or that it is not ours
	start_names 127.0.0.1 -- -b 127.0.0.99
	play -n 'no port' <<'END'
	origin eof
	ask    / = 502
	sees~  %O: .*: no local port is left at 127.0.0.99 \(-b or from\)
	log    502 .* server=%O end=done why=
END
	stop_proxy
	start_proxy -b 192.0.2.77
	play -n 'not ours' <<'END'
	origin eof
	ask    / = 502
	sees~  %O: .*: this machine can't use 192.0.2.77 \(-b or from\)
END
}

test_names_guard() { # who is not local reaches nothing on loopback
	need_me
	start_proxy -l "$me:0"
	has err 'a rule lets them in'
	stop_proxy
	start_proxy
	for host in 127.0.0.1 127.1.2.3 '[::1]' 0.0.0.0 '[::]' 169.254.1.1 \
	    '[fe80::1]' 224.0.0.1 '[ff02::1]' 255.255.255.255 \
	    '[::ffff:127.0.0.1]'; do
		play -n "$host" <<END
		reply  200 | evil
		ask    http://$host:%p/ = 403 Forbidden error=destination_ip_prohibited
		ask    CONNECT $host:%p = 403 Forbidden
		gets!~ .
		log    " 403 .* why="
		log    " 403 .* why="
END
	done
	start_proxy -e "allow client $me"
	play -n 'another address of this machine is no secret' <<END
	origin -a $me
	reply  200 | ok
	ask    / = 200 | ok
END
}

test_names_dead_addresses() { # many attempts at dead addresses delay no living one
	address_here 127.0.0.2 && address_here 127.0.0.3 ||
		skip "no 127.0.0.2 or 127.0.0.3 here"
	deaf -a 127.0.0.2
	dead=$origin_port
	deaf -a 127.0.0.3 -p "$dead"
	deaf -a 127.0.0.1 -p "$dead"
	deaf -a 127.0.0.2
	live=$origin_port
	# shellcheck disable=SC3045 # where it is missing, the test is skipped
	ulimit -n 256 2> /dev/null || skip "no ulimit -n"
	start_names 127.0.0.2 127.0.0.3 127.0.0.1 -- -m 90
	client warm "ask http://two.test:${proxy##*:}/"
	many 40 dead "send PATCH http://two.test:$dead/ HTTP/1.1\nHost: x\n\n"
	"$peer" sleep 700
	patience 4000
	play 'a living one' <<END
	origin -a 127.0.0.1 -p $live
	reply  200 Connection: close | ok
	ask    http://two.test:%p/ = 200 | ok
END
	touch dead.over
	served
}

# ---- 25. Exchange: from the response to the end -----------------------------

# ---- one request and its answer ----

test_forward_get() { # a plain GET, all its lines and its log line; a Date is added
	play 'GET by length' <<'END'
	origin head
	origin send HTTP/1.1 200 OK\nDate: Sun, 06 Nov 1994 08:49:37 GMT\n
	origin send Content-Length: 5\nX-Odd:\nx-odd: 2\n\nhello
	ask    /a?b=c User-Agent: play/1\nReferer: http://x/\nAccept: */* = 200 OK
	sees+  Date: Sun, 06 Nov 1994 08:49:37 GMT
	sees   Content-Length: 5
	sees+~ ^X-Odd: ?$
	sees+  x-odd: 2
	sees   Via: 1.1 proxy-ID
	sees   hello
	sees+  -- end open
	sees!~ ^(Connection: close|Proxy-Status|Age|Transfer-Encoding)
	gets   GET /a?b=c HTTP/1.1
	gets+  Host: %O
	gets   User-Agent: play/1
	gets+  Referer: http://x/
	gets+  Accept: */*
	gets   Via: 1.1 proxy-ID
	gets!~ ^(Connection|Keep-Alive|Forwarded|X-Forwarded|Transfer-Enc|Content-L)
	log    ^127.0.0.1 - - \[DATE\] "GET http://%O/a\?b=c HTTP/1.1" 200 5 "http://x/" "play/1" up=0 dns=- connect=N first=N total=N server=%O end=done$
	== the path of a URL without one is /
	replies 200 |
	ask    http://%O = 200
	ask    http://%O?q/r = 200
	ask    HTTP://%O/%7euser/../x;y=z?a/b?c = 200
	gets   GET / HTTP/1.1
	gets   GET /?q/r HTTP/1.1
	gets   GET /%7euser/../x;y=z?a/b?c HTTP/1.1
	== Date is added
	reply  200 | ok
	ask    /
	sees#  1 ^Date: [A-Z][a-z][a-z], [0-3][0-9] [A-Z][a-z][a-z] 20[0-9][0-9] [0-9:]* GMT$
END
}

test_forward_methods() { # every method passes, known or not, as it was spelt
	script=$(for method in GET POST PUT DELETE OPTIONS PATCH PROPFIND BREW \
	    M-SEARCH get 'X!#$&*+-.^_|~0'; do
		cat <<END
	ask    $method /m
	gets# 1 ^$(printf %s "$method" | sed 's/[^A-Za-z0-9]/./g') /
	log "$(printf %s "$method" | sed 's/[^A-Za-z0-9]/./g') http://%O/m HTTP/1.1" 200 2
END
	done)
	play 'methods' <<END
	replies 200 | ok
	$script
	sees# 11 HTTP/1.1 200 OK$
END
}

test_forward_http10() { # HTTP/1.0 clients: no chunks, closed at the end; servers: body to the close
	play 'chunked answer' <<'END'
	reply  200 Transfer-Encoding: chunked
	origin send 5\nhello\n6;x=y\n world\n0\nX-Trailer: 1\n\n
	ask    1.0 / = 200 OK
	sees   hello world
	sees+  -- end eof
	sees!~ ^(Transfer-Encoding|X-Trailer)
	gets   GET / HTTP/1.1
	gets   Host: %O
	log    "GET http://%O/ HTTP/1.0" 200 11 .* end=done
	== by length, keep-alive wished
	reply  200 | ok
	ask    1.0 / Connection: keep-alive\nProxy-Connection: keep-alive = 200 OK | ok
	sees+  -- end eof
	sees!~ ^(Connection|Proxy-Connection): *[Kk]eep
	== a request body by length
	origin head ; want 5 ; say 200 | ok
	ask    1.0 POST / | hello = 200 | ok
	gets   POST / HTTP/1.1
	gets   hello
	log    "POST http://%O/ HTTP/1.0" 200 2 .* up=5
	== to the close
	origin head ; send HTTP/1.0 200 OK\nX-A: b\n\nhello
	ask    / = 200 OK
	sees   X-A: b
	sees~  ^Via: 1\.[01] proxy-ID$
	sees   hello
	log    200 5 .* end=done
	== by length, then the next on another connection
	origin head ; send HTTP/1.0 200 Fine thing\nContent-Length: 5\n\nhello
	ask    / = 200 Fine thing | hello
	ask    / = 200 Fine thing | hello
	gets#  2 ^-- connection
	== 1.1 to the close
	origin head ; send HTTP/1.1 200 OK\n\nhel ; stall 50 ; send lo
	ask    / = 200 OK
	log    200 5 .* end=done
END
}

test_forward_many() { # many requests on one connection, in turn and in one write; answers in order
	play 'three in turn' <<'END'
	reply  200 | one
	reply  200 Transfer-Encoding: chunked | 3\ntwo\n0\n\n
	reply  404 No | three
	ask    /1 = 200 OK | one
	ask    /2 = 200 OK
	sees   two
	ask    /3 Connection: close = 404 No
	client eof
	sees   Connection: close
	sees   three
	sees+  -- end eof
	gets#  1 ^-- connection
	gets   GET /3 HTTP/1.1
	log    /1 HTTP/1.1" 200 3
	log    /2 HTTP/1.1" 200 3
	log    /3 HTTP/1.1" 404 5
	== empty lines before a request are ignored (RFC 9112 section 2.2)
	reply  200 | ok
	client send \n\nGET http://%O/1 HTTP/1.1\nHost: %O\n\n ; answer
	sees   HTTP/1.1 200 OK
	== three in one write, the first is slow
	origin head ; stall 200 ; say 200 | one\l
	reply  200 Transfer-Encoding: chunked | 4\ntwo\l\n0\n\n
	reply  200 | three\l
	client send GET http://%O/1 HTTP/1.1\nHost: %O\n\nGET http://%O/2 HTTP/1.1\nHost: %O\n\nGET http://%O/3 HTTP/1.1\nHost: %O\nConnection: close\n\n
	client eof
	sees   one\l
	sees   two\l
	sees   three\l
	sees+  -- end eof
	gets   GET /1 HTTP/1.1
	gets   GET /2 HTTP/1.1
	gets   GET /3 HTTP/1.1
	log    /1 HTTP/1.1" 200 4
	log    /2 HTTP/1.1" 200 4
	log    /3 HTTP/1.1" 200 6
	== one byte at a time, a body between
	origin head ; want 5
	origin chop 1 1 HTTP/1.1 200 OK\nConnection: close\nContent-Length: 4\n\none\l
	origin next
	origin head
	origin chop 1 1 HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n4\ntwo\l\n0\n\n
	client chop 1 1 POST http://%O/1 HTTP/1.1\nHost: %O\nContent-Length: 5\n\nhelloGET http://%O/2 HTTP/1.1\nHost: %O\nConnection: close\n\n
	client eof
	sees   one\l
	sees~  two|\\l
	gets   POST /1 HTTP/1.1
	gets   hello
	gets   GET /2 HTTP/1.1
	log    /1 HTTP/1.1" 200 4 .* up=5
	log    /2 HTTP/1.1" 200 4 .* up=0
	== a hundred at once, then half-closed
	replies 200 | ok\l
	client send \{100:GET http://%O/n HTTP/1.1\nHost: %O\n\n} ; shut ; eof
	sees#  100 ^ok.l
	gets#  100 ^GET /n HTTP/1.1
	log#   100 "GET http://%O/n HTTP/1.1" 200 3
END
}

test_forward_head_204_304() { # answers without a body, whatever their fields say
	play 'HEAD by length and chunked, with a liar' <<'END'
	reply  200 Content-Length: 5000
	reply  200 Transfer-Encoding: chunked
	reply  200 | liar
	origin next
	reply  200 | true
	ask    HEAD /1
	ask    HEAD /2
	ask    HEAD /3
	client quiet 100
	ask    /4
	sees   Content-Length: 5000
	sees   Content-Length: 4
	sees   true
	sees!~ liar
	log    "HEAD http://%O/1 HTTP/1.1" 200 0
	log    "HEAD http://%O/2 HTTP/1.1" 200 0
	log    "HEAD http://%O/3 HTTP/1.1" 200 0
	log    "GET http://%O/4 HTTP/1.1" 200 4
	== 204 and 304
	reply  204 No\nContent-Length: 5
	reply  304 Not\nContent-Length: 5000
	reply  304 Not\nTransfer-Encoding: chunked
	reply  200 | true
	ask    /1
	ask    /2
	ask    /3
	ask    /4
	sees   HTTP/1.1 204 No
	sees   HTTP/1.1 304 Not
	sees   HTTP/1.1 304 Not
	sees   true
	gets#  1 ^-- connection
	log    /1 HTTP/1.1" 204 0
	log    /2 HTTP/1.1" 304 0
	log    /3 HTTP/1.1" 304 0
	log    /4 HTTP/1.1" 200 4
END
}

test_forward_interim() { # 100, 102, 103 reach 1.1 clients only
	play 'to a 1.1 client' <<'END'
	origin head ; send HTTP/1.1 100 Continue\n\nHTTP/1.1 102 Processing\n\n
	origin stall 50 ; say 103 Early Hints\nLink: </a> ; say 200 | ok
	ask    /
	sees   HTTP/1.1 100 Continue
	sees   HTTP/1.1 102 Processing
	sees   HTTP/1.1 103 Early Hints
	sees   Link: </a>
	sees   HTTP/1.1 200 OK
	sees   ok
	log    "GET http://%O/ HTTP/1.1" 200 2
	== not to a 1.0 client
	reply  100 Continue
	origin say 103 Early Hints\nLink: </a> ; say 200 | ok
	ask    1.0 / = 200 OK | ok
	sees#  1 ^HTTP/
	sees!~ ^Link
	== a thousand of them are too many
	origin head ; send \{1000:HTTP/1.1 103 Early Hints\nLink: </a>\n\n}
	origin say 200 | ok
	ask    /
	sees~  ^HTTP/1.1 502
	log    502 .* why="
END
}

test_forward_upgrade() { # 101 turns the exchange into a tunnel
	play 'WebSocket' <<'END'
	origin head
	origin send HTTP/1.1 101 Switching Protocols\nUpgrade: websocket\nConnection: Upgrade\n\nfirst
	origin want 4 ; skip 100000 ; send pong ; eof
	ask    /ws Upgrade: websocket\nConnection: keep-alive, Upgrade\nSec-WebSocket-Key: x = 101 Switching Protocols
	client until first ; send ping ; fill 100000 ; until pong ; shut ; eof
	sees   Upgrade: websocket
	sees   firstpong
	sees+  -- end eof
	gets   GET /ws HTTP/1.1
	gets~  ^Upgrade: websocket$
	gets!~ ^Connection:.*keep-alive
	gets#  1 ^Connection: [Uu]pgrade$
	log    "GET http://%O/ws HTTP/1.1" 101 9 .* up=100004 .* end=client
	== refused by the origin: an ordinary answer
	reply  200 | ok
	ask    /ws Upgrade: websocket\nConnection: Upgrade
	ask    /ws Connection: close
	sees#  2 HTTP/1.1 200 OK
	== 101 that nobody asked for
	origin head
	origin send HTTP/1.1 101 Switching Protocols\nUpgrade: x\nConnection: Upgrade\n\nevil
	ask    /ws = 502
	sees!~ evil
	log    502 .* why="
END
}

test_forward_login() { # a login and a fragment in the URL are taken off, and told nobody
	start_proxy -vv
	for url in bob:s3cret@%O/a @%O/a bob@%O/a "b-._~%21!\$&'()*+,;=:b@%O/a" \
	    %O/a# %O/a#part %O/a#p@q/?x#y bob:s3cret@%O/a#part; do
		play -n "$url" <<END
		reply  200 | ok
		client send GET http://$url HTTP/1.1\nHost: %O\nX-A: b\n\n ; answer
		sees   ok
		gets   GET /a HTTP/1.1
		gets+  Host: %O
		gets   X-A: b
		gets!~ ([#@]|^Authorization|s3cret|part)
		log    "GET http://%O/a HTTP/1.1" 200
END
		! grep -e s3cret -e part log err || fail "$url is told"
	done
	play 'without a path; a query has an @ of its own' <<'END'
	reply  200 | ok
	reply  200 | more
	client send GET http://bob:s3cret@%O HTTP/1.1\nHost: %O\n\n ; answer
	client send GET http://bob@%O?a@b#c HTTP/1.1\nHost: %O\n\n ; answer
	sees   more
	gets   GET / HTTP/1.1
	gets   GET /?a@b HTTP/1.1
	log    "GET http://%O HTTP/1.1" 200
	log    "GET http://%O[?]a@b HTTP/1.1" 200
	== a TRACE that ends here
	client send TRACE http://bob:s3cret@%O/x#y HTTP/1.1\nHost: %O\nMax-Forwards: 0\n\n
	client answer
	sees   TRACE http://%O/x HTTP/1.1
	== the login in a Referer is not logged
	reply  200 | ok
	ask    / Referer: http://bob:s3cret@ref.example/a@b
	gets   Referer: http://bob:s3cret@ref.example/a@b
	log    200 2 "ref.example/a@b" "-"
END
}

test_forward_options_trace() { # Max-Forwards; OPTIONS *
	play 'counted down' <<'END'
	replies 200 | ok
	ask    OPTIONS /a Max-Forwards: 10
	ask    OPTIONS /m Max-Forwards: 18446744073709551615
	ask    OPTIONS /n Max-Forwards: 99999999999999999999999
	ask    TRACE /b max-forwards: 1
	ask    /c Max-Forwards: 0
	ask    OPTIONS http://%O
	sees#  6 HTTP/1.1 200 OK
	gets   OPTIONS /a HTTP/1.1
	gets   Max-Forwards: 9
	gets   Max-Forwards: 18446744073709551614
	gets   Max-Forwards: 18446744073709551614
	gets   TRACE /b HTTP/1.1
	gets~  ^[Mm]ax-[Ff]orwards: 0$
	gets   GET /c HTTP/1.1
	gets   Max-Forwards: 0
	gets   OPTIONS * HTTP/1.1
	== answered here at zero
	reply  200 | no
	ask    TRACE /b X-A: b\nMax-Forwards: 0\nProxy-Authorization: Basic c2VjcmV0\nAuthorization: Basic c2VjcmV0\nCookie: c00kie
	ask    OPTIONS /a Max-Forwards: 0
	client send OPTIONS * HTTP/1.1\nHost: %P\n\n ; answer
	sees   HTTP/1.1 200 OK
	sees~  ^Content-Type: message/http
	sees   TRACE http://%O/b HTTP/1.1
	sees   X-A: b
	sees~  ^HTTP/1.1 20[04]
	sees~  ^HTTP/1.1 20[04]
	sees#  3 HTTP/1.1 20[04]
	sees!~ (c2VjcmV0|c00kie)
	gets!~ .
	log    "TRACE http://%O/b HTTP/1.1" 200
	log    "OPTIONS http://%O/a HTTP/1.1" 20[04]
	log    "OPTIONS \* HTTP/1.1" 20[04]
END
}

# ---- tunnels ----

test_tunnel_bytes() { # CONNECT: both ways, early bytes, log line
	play 'bytes that came with the head' <<'END'
	origin want 4 ; send pong ; eof
	client send CONNECT %O HTTP/1.1\nHost: %O\n\nping ; answer head
	client until pong ; shut ; eof
	sees~  ^HTTP/1.1 200
	sees   pong
	sees+  -- end eof
	sees!~ ^(Content-Length|Transfer-Encoding):
	gets   -- connection 1
	gets+  ping
	gets+  -- end eof
	log    "CONNECT %O HTTP/1.1" 200 4 "-" "-" up=4 dns=- connect=N first=[-N0-9]* total=N server=%O end=client$
	== the server speaks first; HTTP/1.0
	origin send hello ; want 3
	client send CONNECT %O HTTP/1.0\n\n ; answer head ; until hello
	client send bye ; eof
	sees~  ^HTTP/1.[01] 200
	sees   hello
	gets   bye
	log    "CONNECT %O HTTP/1.0" 200 5 .* up=3 .* end=server
	== 3 MB each way at once
	origin swap 3000000 ; eof
	ask    CONNECT %O = 200
	client swap 3000000 ; shut ; eof
	log    "CONNECT %O HTTP/1.1" 200 3000000 .* up=3000000 .* end=client
END
}

test_tunnel_ipv6() { # CONNECT [::1]:port, GET http://[::1]:port/
	have_ipv6 || skip "no IPv6 on loopback"
	play 'CONNECT' <<'END'
	origin -a ::1
	origin want 4 ; send pong
	client send CONNECT %O HTTP/1.1\nHost: %O\n\nping ; answer head ; eof
	sees   pong
	gets   ping
	log    "CONNECT \[::1\]:%p HTTP/1.1" 200 4 .* server=\[::1\]:%p end=
	== GET
	origin -a ::1
	reply  200 | ok
	ask    / = 200 | ok
	gets   Host: %O
	log    "GET http://\[::1\]:%p/ HTTP/1.1" 200 2 .* server=\[::1\]:%p end=done
END
}

test_tunnel_ends() { # each direction closes alone, the rest arrives; a reset is felt on the other side; a server resets after its end of stream: the client feels it
	play 'the client closes first' <<'END'
	origin eof ; stall 100 ; fill 300000 ; send end
	ask    CONNECT %O
	client send hello ; shut ; skip 300000 ; eof
	sees~  end$
	sees+  -- end eof
	gets   hello
	gets+  -- end eof
	log    200 300003 .* up=5 .* end=client
	== the server closes first
	origin send hello ; shut ; skip 300000 ; eof
	ask    CONNECT %O
	client eof ; stall 100 ; fill 300000 ; send end
	sees   hello
	gets~  end$
	gets+  -- end eof
	log    200 5 .* up=300003 .* end=server
	== a reset by the client
	origin want 4 ; touch ping ; eof
	ask    CONNECT %O
	client send ping ; await ping ; reset
	gets   ping
	gets+  -- end reset
	log    "CONNECT %O HTTP/1.1" 200 0 .* up=4 .* end=reset
	== a reset by the server
	origin want 4 ; reset
	ask    CONNECT %O = 200
	client send ping ; eof
	sees   -- end reset
	gets   ping
	log    "CONNECT %O HTTP/1.1" 200 0 .* up=4 .* end=reset
	== bytes for a server that is gone
	origin close
	a: ask CONNECT %O
	a: stall 200 ; send a ; touch sent ; await felt
	a: send b ; stall 100 ; send c ; stall 100 ; send d
	a: sees~ ^-- end broken
	do comes sent
	do wait_for 3 'grep "CONNECT .* end=" log' || fail "the tunnel lives on"
	do touch felt
	log    "CONNECT %O HTTP/1.1" 200 0 .* up=1 .* end=(reset|server)
END
}

test_tunnel_unix() { # at a UNIX socket: what a client sent before it closed reaches a slow server
	start_proxy -l "$T/p.sock"
	play 'much, and then closed' <<'END'
	origin stall 500 ; skip 1000000 ; until THE END ; eof
	ask    CONNECT %O = 200
	client fill 1000000 ; send THE END ; close
	gets~  THE END
	gets+  -- end eof
	log    "CONNECT %O HTTP/1.1" 200 0 .* up=1000007 .* end=client
END
}

test_tunnel_stuck() { # one side gone, the other not reading: no spinning
	play 'the client is gone' <<'END'
	origin await gone ; stall 200 ; send \{100:x} ; stall 200
	origin send \{100:x} ; stall 200 ; send \{100:x} ; stall 1500
	origin touch late ; eof
	a: ask CONNECT %O
	a: stuff 100000000 ; touch gone ; reset
	do comes gone
	do before=$(processor_time)
	do comes late
	do used=$(($(processor_time) - before))
END
	[ "$used" -lt 30 ] || fail "used $used/100 s of processor time"
}

test_tunnel_sni() { # the name in a tunnel's TLS greeting is in the log
	start_rules < /dev/null
	for first in 0 1 70 -60; do
		play -n "a greeting in pieces, $first" <<END
		origin until THE END ; send pong
		ask    CONNECT any.example:%p
		client send $(hello Www.films.example "$first")THE END
		client until pong
		log    "CONNECT any.example:%p HTTP/1.1" 200 .* sni=Www.films.example( |$)
END
	done
	play -n 'the name of CONNECT, in another case' <<END
		origin until THE END ; send pong
		ask    CONNECT any.example:%p
		client send $(hello Any.Example)THE END ; until pong
		log    "CONNECT any.example:%p HTTP/1.1" 200 .* sni=any.example( |$)
END
	for bytes in "$(hello)" 'SSH-2.0-x\n' '\x16\x03\x01\0\0' '\x16\x03' \
	    "$(hello 'a b')"; do
		play -n "no name in $bytes" <<END
		origin until THE END ; send pong
		ask    CONNECT any.example:%p
		client send ${bytes}THE END ; until pong
		log    "CONNECT any.example:%p HTTP/1.1" 200
		log!   sni=
END
	done
}

test_tunnel_cancelled() { # a download through a tunnel is cancelled: the server feels it at once
	start_proxy -l 127.0.0.1:0 -l "$T/p.sock"
	origin o 'stuff 1000000000 ; eof'
	for n in 1 2 3 4 5 6; do
		[ $((n % 3)) = 0 ] && where=$T/p.sock || where=$proxy
		[ $((n % 2)) = 0 ] && end=shut || end=close
		client_bg c$n "$where" <<END
ask CONNECT %O
want 40000 ; stall $((n * 20)) ; $end ; stall 50
END
	done
	ends c1 c2 c3 c4 c5 c6 .
	rests "all clients are gone"
	for n in 1 2 3 4 5 6; do
		wait_for 3 "[ -f o.$n.end ]" ||
			fail "server $n does not feel that its client left"
	done
	counts 6 log '" 200 [0-9]* .* end='
	served
}

test_tunnel_refused_rest() { # what follows a refused CONNECT is no request
	nobody
	dead=$origin
	for early in 'GET http://%O/evil HTTP/1.1\nHost: %O\n\n' \
	    '\x16\x03\x01\x00\x05\x01\x00\x00\x01\xfc'; do
		play 'refused by the target' <<END
		reply  200 | evil
		client send CONNECT $dead HTTP/1.1\nHost: $dead\n\n$early
		client eof
		sees   HTTP/1.1 502 Bad Gateway
		sees   Connection: close
		sees!~ evil
		sees~  ^-- end (eof|reset)
		gets!~ .
		log#   1 .
		log    "CONNECT $dead HTTP/1.1" 502 .* why="
END
	done
	evil='GET http://%O/evil HTTP/1.1\nHost: %O\n\n'
	for field in 'Content-Length: 40' 'Transfer-Encoding: chunked'; do
		refused 400 \
		    "CONNECT %O HTTP/1.1\\nHost: %O\\n$field\\n\\n$evil"
	done
}

test_tunnel_early_101() { # a server may not switch before it has the whole request
	play 'in a chunk' <<'END'
	origin head ; until hel
	origin send HTTP/1.1 101 Switching\nUpgrade: odd\nConnection: upgrade\n\n ; eof
	client send POST http://%O/ HTTP/1.1\nHost: %O\nUpgrade: odd\nConnection: upgrade\nTransfer-Encoding: chunked\n\n5\nhel
	client until \n\n ; send lo\n0\n\nraw ; eof
	sees~  ^HTTP/1.1 502
	sees~  ^Proxy-Status: proxy-ID; error=http_upgrade_failed
	sees!~ ^HTTP/1.1 101
	gets!~ raw
	log    "POST http://%O/ HTTP/1.1" 502 .* why="
	== a body by length
	reply  101 Switching\nUpgrade: odd\nConnection: upgrade
	origin eof
	client send POST http://%O/ HTTP/1.1\nHost: %O\nUpgrade: odd\nConnection: upgrade\nContent-Length: 5\n\nhel
	client until \n\n ; send lo ; eof
	sees~  ^HTTP/1.1 502
	sees!~ ^HTTP/1.1 101
	log    "POST http://%O/ HTTP/1.1" 502 .* why="
END
}

test_tunnel_slow_reader() { # a half-closed tunnel lasts as long as bytes flow, however slowly
	quick
	start_proxy -l "$T/p.sock"
	size=1500000
	play 'the client reads slowly' <<END
	origin want 5 ; fill $size
	ask    CONNECT %O = 200
	client send hello ; shut
	$(awk 'BEGIN { while (n++ < 40) print "client skip 4000 ; stall 50" }')
	client skip $((size - 160000)) ; eof
	sees   -- end eof
	log    "CONNECT %O HTTP/1.1" 200 $size .* up=5 .* end=client
END
}

# The next line of the log, the last now, has NAME=N with N from LOW to HIGH:
# log_between NAME LOW HIGH
log_between() {
	wait_for 5 "[ \"\$(wc -l < log)\" -gt ${between_lines-0} ]"
	between_lines=$(wc -l < log)
	between=$(sed -n "\$s/.* $1=\([0-9]*\).*/\1/p" log)
	[ "${between:--1}" -ge "$2" ] && [ "$between" -le "$3" ] ||
		fail "$1 is $between, not $2 to $3: $(tail -n 1 log)"
}

test_tunnel_reset_rate() { # a client resets: what it sent may wait for a rate, but not for long
	quick
	start_proxy -e 'rate 100'
	play -n 'more than can go on in time' <<'END'
	origin stall 60 ; eof
	a: send CONNECT %O HTTP/1.1\nHost: %O\n\n ; answer head ; send \{4000:x} ; stall 100 ; reset
	log    "CONNECT %O HTTP/1.1" 200 0 .* up=[1-9][0-9]{1,2} .* end=[a-z]+
END
	log_between total 900 5000
}

# ---- what can go wrong with servers ----

test_error_names() { # a name that does not resolve
	play 'GET' <<'END'
	ask    http://nosuchname.invalid/ = 50[24] error=dns_(error|timeout)
	sees~  ^Content-Type: text/plain; charset=utf-8
	sees~  ^50[24] [A-Z][a-z]* [A-Z][a-z]*: .
	sees~  nosuchname.invalid
	log    "GET http://nosuchname.invalid/ HTTP/1.1" 50[24] .* dns=N connect=- .* server=- end=[a-z]* why="
	== CONNECT
	ask    CONNECT nosuchname.invalid:443 = 50[24] error=dns_(error|timeout)
	log    "CONNECT nosuchname.invalid:443 HTTP/1.1" 50[24]
END
	long=$(printf '%0300d' 0 | tr 0 a)
	play 'too long a name' <<END
	ask    http://$long.invalid/ = (400|414|502|504)
	log    " (400|414|502|504) .* why="
END
}

test_error_refused() { # nobody listens there; where nobody listens, the proxy does not take itself for the server
	nobody
	play 'GET, and the client connection lives on' <<'END'
	ask    / = 502 Bad Gateway
	sees~  ^Proxy-Status: proxy-ID; error=connection_refused.*; details="
	sees~  ^Content-Type: text/plain; charset=utf-8
	sees~  ^502 Bad Gateway: .
	sees~  %O.*[Rr]efused
	ask    HEAD /
	client quiet 100
	log    "GET http://%O/ HTTP/1.1" 502 .* server=(-|%O) end=[a-z]* why="
	log    "HEAD http://%O/ HTTP/1.1" 502 0 .* end=[a-z]* why="
	== CONNECT
	ask    CONNECT %O = 502 Bad Gateway error=connection_refused
	log    "CONNECT %O HTTP/1.1" 502
	== POST with a body that nobody reads
	client send POST http://%O/ HTTP/1.1\nHost: %O\nContent-Length: 3000000\n\n
	client stuff 3000000 ; answer
	sees   HTTP/1.1 502 Bad Gateway
	log    "POST http://%O/ HTTP/1.1" 502
END
	unit self
}

test_error_loop() { # our own address, by any name, is a loop
	start_proxy -l 127.0.0.1:0 -l 127.0.0.1:0
	other=$(sed -n 's/^proxy: listening on //p' err | sed -n 2p)
	for host in 127.0.0.1 localhost LOCALHOST localhost. 0.0.0.0 \
	    '[::ffff:127.0.0.1]' '[::ffff:7f00:1]' 127.1 2130706433 0x7f.1; do
		for url in "GET http://$host:${proxy##*:}/" \
		    "GET http://$host:${other##*:}/x" \
		    "CONNECT $host:${proxy##*:}"; do
			case $host in
			[0-9]*.*.*.* | *:*) want=508 ;;
			[0-9]*) want='(508|502|504|400)' ;;
			*) want='(508|502|504)' ;; # may not resolve
			esac
			play -n "$url" <<END
			client send $url HTTP/1.1\nHost: x\n\n
			client answer
			sees~  ^HTTP/1.1 $want
			log#   1 .
			log    " $want .* why="
END
		done
	done
	served
}

test_error_loop_all() { # the same when listening on all addresses
	start_proxy -l :0
	port=${proxy##*:}
	hosts='127.0.0.1 127.0.0.2 0.0.0.0 [::ffff:127.0.0.1]'
	proxy=127.0.0.1:$port
	have_ipv6 && hosts="$hosts [::1] [::]"
	for host in $hosts; do
		play -n "$host" <<END
		ask    http://$host:$port/ = 508
		log#   1 .
		log    " 508 .* why="
END
	done
	served
}

test_error_loop_nonlocal() { # where sockets are bound to any address (ip_nonlocal_bind), only our own are a loop
	quick
	NONLOCAL_BIND=1
	export NONLOCAL_BIND
	start_proxy -l :0
	port=${proxy##*:}
	proxy=127.0.0.1:$port
	play -n 'another machine, the same port' <<END
	ask    http://198.51.100.7:$port/ = 50[24]
	log    " 50[24] .* why="
	== our own
	ask    http://127.0.0.2:$port/ = 508
END
}

# ---- clients that leave ----

test_client_gives_up() { # a client that asked to keep its connection and closes it has gone: 499
	play 'kept, and closed' <<'END'
	origin head ; eof
	client send GET http://%O/ HTTP/1.1\nHost: %O\nProxy-Connection: Keep-Alive\n\n
	client stall 100 ; shut ; eof
	log    "GET http://%O/ HTTP/1.1" 499 0 .* total=N .* end=client
	gets~  ^-- end (eof|reset)
	== closed in the middle of a response that may never end
	reply  200 Transfer-Encoding: chunked | 3\none\n
	origin eof
	client send GET http://%O/ HTTP/1.1\nHost: %O\nConnection: keep-alive\n\n
	client until one ; close
	gets~  ^-- end (eof|reset)
	log    "GET http://%O/ HTTP/1.1" 200 3 .* end=client
	== not asked to be kept, and half-closed
	origin head ; stall 300 ; say 200 | ok
	client send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; shut ; answer
	sees   HTTP/1.1 200 OK
	log    "GET http://%O/ HTTP/1.1" 200 2 .* end=done
	== with the next request already there
	origin head ; stall 300 ; say 200 | ok
	reply  200 | ok
	client send GET http://%O/1 HTTP/1.1\nHost: %O\nConnection: keep-alive\n\nGET http://%O/2 HTTP/1.1\nHost: %O\n\n
	client shut ; answer ; answer
	sees#  2 ^(ok)?HTTP/1.1 200
END
}

test_client_gives_up_early() { # the same before its request was sent, and with a body
	says=$("$peer" deaf deaf) || skip "cannot make a port that does not answer"
	echo "${says#* }" >> .pids
	start_names 127.0.0.1
	play 'while the name is looked up' <<END
	client send GET http://slow.test/ HTTP/1.1\nHost: x\nConnection: Keep-Alive\n\n
	client stall 100 ; shut ; eof
	log    "GET http://slow.test/ HTTP/1.1" 499 0 .* end=client
	== a tunnel that is not open yet
	client send CONNECT slow.test:443 HTTP/1.1\nHost: x\nProxy-Connection: Keep-Alive\n\n
	client stall 100 ; shut ; eof
	log    "CONNECT slow.test:443 HTTP/1.1" 499 0 .* end=client
	== while it is being connected
	client send GET http://127.0.0.1:${says% *}/ HTTP/1.1\nHost: x\nConnection: Keep-Alive\n\n
	client stall 100 ; shut ; eof
	log    "GET http://127.0.0.1:${says% *}/ HTTP/1.1" 499 0 .* end=client
	== its body has been sent
	origin head ; want 4 ; eof
	client send POST http://%O/ HTTP/1.1\nHost: %O\nConnection: keep-alive\nContent-Length: 4\n\nbody
	client stall 100 ; shut ; eof
	log    "POST http://%O/ HTTP/1.1" 499 0 .* up=4 .* end=client
	gets~  ^-- end (eof|reset)
END
}

test_client_gives_up_parent() { # the same while a SOCKS parent says nothing
	origin o 'want 3 ; eof'
	start_proxy -x "socks5://$origin"
	play -n 'nothing said' <<'END'
	client send GET http://example.test/ HTTP/1.1\nHost: x\nConnection: keep-alive\n\n
	client stall 100 ; shut ; eof
	log    "GET http://example.test/ HTTP/1.1" 499 0 .* end=client
END
}

test_client_gives_up_shared() { # a fetch that others follow goes on without its first client
	start_proxy -c cache
	play 'three clients' <<'END'
	origin head ; touch asked ; await go ; say 200 Cache-Control: max-age=60 | ok
	first: send GET http://%O/ HTTP/1.1\nHost: %O\nConnection: keep-alive\n\n
	first: await leave ; shut ; eof
	do comes asked
	second: ask / Connection: keep-alive = 200 | ok
	client send GET http://%O/ HTTP/1.1\nHost: %O\nConnection: keep-alive\n\n
	client stall 100 ; shut ; eof
	do has log ' 499 0 .* end=client' 5
	do touch leave
	do ended first
	do touch go
	gets#  1 ^GET
	log#   2 499 0 .* end=client$
END
}

test_client_gives_up_unix() { # at a UNIX socket: one that closes has gone, one that half-closes has not
	start_proxy -l "$T/p.sock"
	play 'closed' <<'END'
	origin head ; eof
	client send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; stall 100 ; close
	log    "GET http://%O/ HTTP/1.1" 499 0 .* end=client
	gets~  ^-- end (eof|reset)
	== half-closed
	origin head ; stall 200 ; say 200 | ok
	client send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; shut ; answer
	sees   HTTP/1.1 200 OK
END
}

# ---- 26. Loop ---------------------------------------------------------------

test_limit_slots() { # all slots taken: no spinning, and served again after
	start_proxy -m 2
	play 'two tunnels, and a third client' <<'END'
	origin eof
	origin next
	origin eof
	origin next
	reply  200 | ok
	a: ask CONNECT %O
	a: touch a.open ; await a.close ; shut ; eof
	do comes a.open
	b: ask CONNECT %O
	b: touch b.open ; await b.close ; shut ; eof
	do comes b.open
	c: ask / Connection: close = 200 | ok
	do rests waiting 1500 30
	do [ ! -f o1.3 ] || fail "-m 2 serves a third connection"
	do touch a.close
	a: ends .
	c: ends .
	do served
	do touch b.close
	b: ends .
	do rests idle
END
}

test_limit_lowered() { # fewer open files allowed: idle clients give way; a poll that fails is said, and neither spins nor ignores TERM
	have prlimit || skip "no prlimit"
	start_proxy
	many 40 hold 'send OPTIONS * HTTP/1.1\nHost: %P\n\n ; answer'
	n=0
	while [ -e /proc/"$proxy_pid"/fd/$n ]; do
		n=$((n + 1))
	done
	if [ $n -gt 40 ]; then
		prlimit --pid "$proxy_pid" --nofile=$n:$n || skip "prlimit cannot"
		client n "ask here /"
		has n '^HTTP/1.1 200' 5
		counts 1 err 'connections are in use (-m, ulimit -n), Too many open'
	fi
	prlimit --pid "$proxy_pid" --nofile=20:20 2> /dev/null ||
		skip "prlimit cannot"
	client_bg c 'touch c.here ; eof'
	comes c.here
	has err "can't poll"
	rests "with a poll that fails"
	stop_proxy
	touch hold.over
	start_proxy -j 2
	workers 2
	prlimit --pid "$proxy_pid" --nofile=0:
	kill -HUP "$proxy_pid"
	rests "a supervisor with a poll that fails"
	# Sanitizers open files at the end.
	prlimit --pid "$proxy_pid" --nofile=64:
	stop_proxy
}

test_limit_slots_idle() { # all slots taken: idle clients give way, the longest idle first
	start_proxy -m 4
	origin o <<'END'
reply 200 | ok
---
reply 200 | ok
---
head ; touch busy ; await free ; say 200 | ok
END
	# A silent one, two between requests, one in the middle.
	client_bg silent 'touch silent.here ; eof'
	wait_for 5 '[ -f silent.here ]'
	for n in a b; do
		client_bg $n "ask /$n ; touch $n.here ; eof"
		wait_for 5 "[ -f $n.here ]" || fail "$n is not served"
		"$peer" sleep 50
	done
	client_bg c 'ask /c'
	comes busy
	for gone in a b to.a to.b; do
		[ ! -f silent.end ] || fail "a silent one goes before an idle one"
		client_bg to.$gone 'ask here / ; eof'
		wait_for 2 "[ -f $gone.end ]" || fail "$gone does not give way"
		has to.$gone '^HTTP/1.1 200' 5
	done
	# With only silent and busy ones left, the silent one goes.
	for n in 1 2 3; do
		client_bg silent$n 'touch here ; eof'
	done
	wait_for 2 '[ -f silent.end ]' || fail "the silent one does not give way"
	[ ! -f c.end ] || fail "a busy one gives way"
	touch free
	ended c
	has c ok
	counts 1 err 'connections are in use'
}

test_limit_slots_burst() { # more clients at once than slots: who has just come does not give way
	start_proxy -m 4
	origin o 'head ; stall 20 ; say 200 Connection: close | ok'
	awk 'BEGIN { while (n++ < 19) print "dial"
	print "stall 200"
	for (n = 1; n <= 20; n++)
		print "over " n " ; send GET http://%O/ HTTP/1.1\\nHost: x\\nConnection: close\\n\\n"
	for (n = 1; n <= 20; n++)
		print "over " n " ; answer" }' | client c
	came_to c open
	counts 20 c HTTP/1.1.200
	has err '4 of 4 connections are in use (-m, ulimit -n): idle'
}

test_limit_slots_wait() { # all slots taken and another client waits: the answer says that its connection ends
	start_proxy -m 1
	play 'two clients' <<'END'
	origin head ; touch asked ; await waits ; say 200 | ok
	reply  200 Connection: close | ok
	a: ask / = 200 | ok
	a: eof
	do comes asked
	b: ask / Connection: close = 200 | ok
	do has err connections.are.in.use 5
	do touch waits
	a: sees# 1 ^Connection: close
	a: ends eof
END
	served
}

test_limit_slots_silent() { # all slots taken: who half-closed gives way when its server is silent, not at once
	start_proxy -m 1
	play 'half-closed' <<'END'
	origin head ; touch asked ; eof
	half: send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; shut ; eof
	do comes asked
	new: ask here / Connection: close = 200
	do wait_for 5 '[ -f half.end ]' || fail "it does not give way"
	do wait_for 5 'grep -E " 499 0 .* total=([5-9]..|[0-9]{4,}) .*end=limit" log' || fail "at once: $(cat log)"
END
}

# Opens 5000 connections with one request each and compares.
hold_many() {
	many=2500
	# shellcheck disable=SC3045 # -H is of POSIX.1-2024
	files=$(ulimit -H -n 2> /dev/null || ulimit -n)
	case $files in
	unlimited) ;;
	*) [ "$files" -gt $((many * 2 + 300)) ] ||
		skip "only $files descriptors (ulimit -H -n)" ;;
	esac
	# shellcheck disable=SC3045 # where it is missing, nothing is lost
	ulimit -S -n "$files" 2> /dev/null
	echoes
	start_proxy -m 3000
	need_memory
	served
	before=$(private_memory)
	many $many hold "$@"
	"$peer" sleep 100
	after=$(private_memory)
	each=$(((after - before) * 1024 / many))
	[ $each -lt 1024 ] || fail "$each bytes each"
	touch hold.over
	ends hold '^open$'
	served
}

test_resources_tunnels() { # 2500 idle tunnels cost under 1 KiB each, and live
	hold_many 'send CONNECT %O HTTP/1.1\nHost: %O\n\n ; answer head' \
	    'send x ; want 1'
}

test_resources_kept_clients() { # 2500 idle kept clients: the same
	asked='send OPTIONS * HTTP/1.1\nHost: %P\n\n ; answer'
	hold_many "$asked" "$asked"
}

# For $proxy_wrap: so many files, and no /dev, /etc, home or passwd; nothing can
# be written.
chrooted() {
	# shellcheck disable=SC3045 # it is there where musl-gcc is
	ulimit -n "$1"
	shift 2
	exec env -i "$(command -v chroot)" root /proxy "$@"
}

test_resources_board() { # musl, 4 KiB buffers, an empty root: 64 descriptors do, and 64 clients at once take under 1 MiB
	sanitized && skip "$special says nothing"
	have musl-gcc || skip "no musl-gcc"
	[ "$(id -u)" = 0 ] || skip "not root"
	mkdir root
	linked -static -o root/proxy || fail "$(head -n 1 cc.out)"
	chmod 555 root
	load_origin
	for files in 64 256; do
		[ -z "$proxy_pid" ] || stop_proxy
		proxy_wrap="chrooted $files" start_proxy -m 64
		"$peer" measure -n -x "${proxy##*:}" "$origin_port" 64 1000 9999 20000 \
		    > load
		read -r answers _ errors _ < load
		[ "$answers $errors" = "1000 0" ] || fail "$answers answers"
		served
	done
	[ "$(find root -type f)" = root/proxy ] || fail "it has written"
	most=$(sed -n 's/^VmHWM:[^0-9]*\([0-9]*\) kB/\1/p' "/proc/$proxy_pid/status")
	[ -n "$most" ] || skip "/proc/PID/status does not say"
	[ "$most" -lt 1024 ] || fail "$most KiB resident"
}

test_resources_calls() { # a small GET: 4 transfers, and the log's write; a new client: one accept
	need_calls
	start_proxy
	play -n 'four of them' <<'END'
	replies 200 | \{1024:x}
	a: ask /first = 200
	a: stall 300 ; touch warm ; await counted
	a: ask /1 = 200
	a: ask /2 = 200
	a: stall 300
	a: ask /3 = 200
	a: ask /4 = 200
	a: stall 300 ; touch done ; await over
	do comes warm
	do count_calls
	do touch over
	log    /4 HTTP/1.1" 200 1024 .* connect=- .* end=done
END
	transfers=$(calls 'p?readv?|p?writev?|recv[a-z]*|send[a-z]*')
	others=$(calls -v 'p?readv?|p?writev?|recv[a-z]*|send[a-z]*|poll|ppoll')
	[ "$logs" -ge 1 ] && [ "$logs" -le 4 ] || fail "$logs writes to the log"
	[ "$transfers" = 16 ] ||
		fail "4 requests took $transfers transfers instead of 16"
	[ "$others" -le 4 ] || fail "$others other calls: $(cut -c1-40 calls)"
	count_from=$(($(wc -l < all.calls) + 1))
	for n in 1 2 3; do
		client $n 'ask http://%O/ Connection: close'
		"$peer" sleep 100
	done
	tail -n "+$count_from" all.calls > calls
	[ "$(grep -c '^accept' calls)" = 3 ] && ! grep '^setsockopt' calls ||
		fail "3 clients took $(grep -c '^accept\|^setsock' calls) calls"
}

test_resources_turns() { # fast bytes, passed on or dropped, take under 1 MiB of a turn: others are served between
	need_calls
	start_proxy
	play -n 'a download' <<'END'
	reply  200 Content-Length: 32000000
	origin stuff 32000000
	a: send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; until \n\n ; skip 32000000 ; touch done
	do comes done
	== a refused upload
	b: send POST http://x.test:0/ HTTP/1.1\nHost: x\nContent-Length: 32000000\n\n ; stuff 32000000 ; touch dropped
	do comes dropped
END
	for call in read write; do
		most=$(awk -v call="^$call" '/^p?poll/ { n = 0 } $0 ~ call { n += $NF; if (n > most) most = n }
			END { print most }' all.calls)
		[ "$most" -ge 100000 ] && [ "$most" -lt 1048576 ] || fail "$call: $most bytes"
	done
}

test_limit_empty_lines() { # a client that sends empty lines without end, or in pieces, has the time of a head
	quick
	start_proxy -m 1
	client_bg flood 'send \{1000:\n} ; loop'
	patience 4000
	served
	client_bg drip 'send \x0d ; stall 200 ; send \x0a ; stall 200 ; loop'
	"$peer" sleep 300
	served
}

test_limit_flood() { # refused clients that never stop sending keep nobody out
	surrounded
	export LINGER_MS=30
	play -n 'beside a download' <<'END'
	reply  200 Content-Length: 1000000000
	origin stuff 1000000000
	a: send GET http://%O/ HTTP/1.1\nHost: %O\n\n ; until \n\n ; skip 1000000000
	do "$peer" flood "$proxy" 900
	do patience 3000
	do served
	do stop_proxy
	a: sees~ ^-- end
END
}

test_resources_few_busy() { # idle tunnels take nothing from the few that are busy
	sanitized && skip "$special says nothing"
	echoes
	# shellcheck disable=SC3045 # where it is missing, nothing is lost
	ulimit -S -n "$(ulimit -H -n)" 2> /dev/null
	start_proxy -m 4000
	many 3000 idle 'send CONNECT %O HTTP/1.1\nHost: x\n\n'
	origin o 'replies 200 | ok'
	"$peer" sleep 1500
	# As fast as they come, and with pauses.
	for pause in '' ' ; stall 3'; do
		before=$(processor_time)
		awk -v pause="$pause" 'BEGIN {
			while (n++ < 400) print "ask /" pause }' | client c
		used=$(($(processor_time) - before))
		[ "$used" -lt 80 ] || fail "400 requests beside 3000 idle" \
		    "tunnels took $used/100 s$pause"
		[ "$(cat c.end)" = open ] || fail "the client: $(cat c.end)"
	done
	touch idle.over
	served
}

test_signal_usr1() { # USR1: a line a busy slot on standard error
	play 'a tunnel' <<'END'
	origin eof
	a: ask CONNECT %O
	a: touch open ; await close
	do comes open
	do kill -USR1 "$proxy_pid"
	do wait_for 5 'grep "^proxy: .*$origin" err'
	do [ "$(grep -c "$origin" err)" = 1 ] || fail "more than a line a slot"
	do served
	do touch close
	== a half-closed one
	origin until ping ; touch shut ; eof ; stall 20000
	a: ask CONNECT %O
	a: send ping ; shut ; await closed
	do comes shut
	do wait_for 5 'kill -USR1 "$proxy_pid"; grep "^proxy: .*$origin, .*sends no" err'
	do touch closed
	err~   up 4, down 0, server %O, no byte for [0-9]* s, the client sends no more; in buffers: from the client 0 bytes, to it 0, from the server 0, to it 0; acts again in [0-9]* s if nothing moves$
END
}

test_signal_usr1_waits() { # USR1: what each exchange waits for, in words
	start_names 127.0.0.1 -- -e 'hang url hang' -e 'delay 60s url delay'
	origin o 'head ; eof'
	client_bg idle 'eof'
	client_bg head 'send GET / HTTP/1.1\n ; eof'
	client_bg name 'send GET http://slow.test/ HTTP/1.1\nHost: x\n\n ; eof'
	client_bg get "send GET http://$origin/get HTTP/1.1\nHost: x\n\n ; eof"
	client_bg post "send POST http://$origin/post HTTP/1.1\nHost: x\nContent-Length: 9\n\n ; eof"
	client_bg hang "send GET http://$origin/hang HTTP/1.1\nHost: x\n\n ; eof"
	plain_origin
	client_bg delay "send GET http://$origin/delay HTTP/1.1\nHost: x\n\n ; eof"
	wait_for 5 'kill -USR1 "$proxy_pid"; grep "^proxy: 7 of 1000 connections in use" err'
	while read -r ere; do
		wait_for 5 'kill -USR1 "$proxy_pid"; grep -E "^proxy: #[0-9]+ $ere" err > found' ||
			fail "no $ere: $(tail -n 8 err)"
	done <<'END'
request, waits for a request, [0-9.]+ s, 127[0-9.:]+, up 0, down 0; in buffers: from the client 0 bytes, .*; acts again in
request, waits for a request, [0-9.]+ s, 127[0-9.:]+, up 0, down 0; in buffers: from the client 16 bytes, .*; acts again in
resolve, waits for an address, [0-9.]+ s, 127[0-9.:]+ GET http://slow.test/, up 0, down 0; in
response, waits for the server to send, [0-9.]+ s, 127[0-9.:]+ GET http://[0-9.:]+/get, up 0, down 0, server 127[0-9.:]+, no byte for [0-9]+ s; in
response, waits for the client to send or the server to send, [0-9.]+ s, 127[0-9.:]+ POST http://[0-9.:]+/post,
response, waits for the client to give up, [0-9.]+ s, 127[0-9.:]+ GET http://[0-9.:]+/hang, .*, bent by -e:1;
response, waits for the end of a delay, [0-9.]+ s, 127[0-9.:]+ GET http://[0-9.:]+/delay, .*, bent by -e:2;
END
}

test_loop_orphans() { # what others leave to the proxy is reaped, as process 1 of a container gets it
	# A child from before the start of the program is the same to it; one may
	# end before the proxy catches signals, and before it listens.
	for what in 0 2000; do
		printf '"%s" sleep %s &\necho $! > orphaned\nexec "$@"\n' \
		    "$peer" $what > parent
		proxy_wrap="sh parent"
		start_proxy
		proxy_wrap=
		read -r orphan < orphaned
		wait_for 10 "! kill -0 $orphan 2> /dev/null" ||
			fail "$what: $orphan is not reaped"
		stop_proxy
	done
	start_proxy -j 2
	served
}

# ---- 27. Workers ------------------------------------------------------------

# Sets $workers to the processes of the proxy's workers, once there are N:
# workers N
workers() {
	wait_for 10 "has_children $1" || fail "not $1 workers: $children"
	workers=$children
}

# Until all_go, only this worker serves: only_worker PID
only_worker() {
	for other_pid in $workers; do
		[ "$other_pid" = "$1" ] && kill -CONT "$1" ||
			kill -STOP "$other_pid"
	done
}

all_go() {
	# shellcheck disable=SC2086 # several
	kill -CONT $workers
}

# True if that metric has this value now: metric NAME VALUE
metric() {
	page /metrics
	grep -F -x "$1 $2" page > /dev/null
}

test_worker_first() { # a supervisor that can't fork at first starts its workers later
	our_names
	: > fork-fails
	start_proxy -j 2
	has err "can't start worker"
	"$peer" sleep 1500
	counts 1 err "can't start worker"
	rm fork-fails
	workers 2
	served
}

test_worker_all() { # -j: all workers serve, and count together
	start_proxy -j 3
	workers 3
	counts 1 err 'listening on'
	plain_origin
	for pid in $workers; do
		only_worker "$pid"
		asks GET "http://$origin/"
		page /status
		sed -n 's/^  worker \([1-3]\) of 3 answers: .*/\1/p' page >> numbers
	done
	[ "$(sort numbers | tr -d '\n')" = 123 ] || fail "$(cat numbers)"
	all_go
	for pid in $workers; do
		only_worker "$pid"
		wait_for 5 'metric "proxy_exchanges_total{result=\"miss\"}" 3' ||
			fail "$(grep exchanges_total page)"
		has page '^proxy_connections_limit 999$'
		all_go
	done
	counts 3 log "GET http://$origin/"
	stop_proxy
	lacks err 'has ended'
	# shellcheck disable=SC2086 # several
	for pid in $workers; do
		! kill -0 "$pid" 2> /dev/null || fail "worker $pid is left"
	done
}

test_worker_killed() { # a worker that dies is replaced, and costs its exchanges only
	plain_origin
	start_proxy -j 2
	workers 2
	first=${workers%% *} second=${workers#* }
	second=${second%% *}
	only_worker "$first"
	asks GET "http://$origin/"
	client_bg slow "send CONNECT $origin HTTP/1.1\nHost: x\n\n ; answer head ; touch open ; await killed ; send GET / HTTP/1.1\nHost: x\n\n ; answer"
	comes open
	all_go
	kill -KILL "$second"
	has err "^proxy: worker [12], process $second, has ended: [A-Za-z]*, signal 9.*another is started" 10
	workers 2
	case " $workers" in
	*" $second "*) fail "the same process" ;;
	*" $first "*) ;;
	*) fail "the other one is gone, too" ;;
	esac
	touch killed
	ends slow '^open$'
	has slow '^HTTP/1.1 200 OK'
	for pid in $workers; do
		only_worker "$pid"
		asks GET "http://$origin/"
		wait_for 5 'metric "proxy_exchanges_total{result=\"miss\"}" 1 ||
			metric "proxy_exchanges_total{result=\"miss\"}" 2 ||
			metric "proxy_exchanges_total{result=\"miss\"}" 3' ||
			fail "lost its counters: $(grep exchanges_total page)"
		all_go
	done
	wait_for 5 'metric "proxy_exchanges_total{result=\"miss\"}" 3' ||
		fail "lost counters: $(grep exchanges_total page)"
	metric proxy_connections_limit 1000 || fail "$(grep limit page)"
}

test_worker_orphaned() { # what a dead worker leaves behind is reaped by a supervisor that is process 1
	have ps || skip "no ps"
	"$peer" reaper "$peer" sleep 0 || skip "nobody else inherits orphans"
	proxy_wrap="$peer reaper" start_proxy -j 2
	workers 2
	kill -KILL "${workers%% *}"
	has err 'has ended: [A-Za-z]*, signal 9' 10
	wait_for 10 'metric proxy_connections_limit 1000' || fail "no other one"
	wait_for 5 'has_children 2' || fail "children: $children"
}

test_worker_hangs() { # a worker that hangs while others are full of idle clients keeps nobody out
	start_proxy -j 2 -m 16
	plain_origin
	workers 2
	only_worker "${workers%% *}"
	n=0
	while [ $((n += 1)) -le 8 ]; do
		client_bg "hold$n" "ask / ; touch held$n ; eof"
	done
	comes held1 held2 held3 held4 held5 held6 held7 held8
	served
	has err '^proxy: worker [12]: 8 of 8 connections are in use'
	all_go
}

test_worker_dies_often() { # a worker that dies at once again and again is not started all the time
	start_proxy -j 2
	n=0 born=$("$peer" clock)
	while [ $((n += 1)) -le 3 ]; do
		workers 2
		kill -KILL "${workers%% *}"
		wait_for 10 '[ "$(grep -c "has ended: [A-Za-z]*, signal 9" err)" = '$n' ]' ||
			fail "$n: $(cat err)"
	done
	workers 2
	served
	[ $(($("$peer" clock) - born)) -ge 1000 ] || fail "without a pause"
}

test_worker_signals() { # HUP and USR1 reach all workers, TERM ends all
	plain_origin
	echo allow > rules
	start_proxy -j 3 -f rules -o "$T/file"
	workers 3
	kill -USR1 "$proxy_pid"
	for n in 1 2 3; do
		has err "^proxy: worker $n: 0 of 333 connections in use" 5
	done
	lacks err '^proxy: 0 of'
	# A worker obeys nobody else.
	# shellcheck disable=SC2086 # several
	kill -HUP $workers
	# shellcheck disable=SC2086 # several
	kill -TERM $workers
	echo nonsense > rules
	kill -HUP "$proxy_pid"
	has err 'the old rules stay in force' 5
	served
	echo deny > rules
	mv file old
	kill -HUP "$proxy_pid"
	# One more, which was not there.
	kill -KILL "${workers%% *}"
	has err 'has ended: [A-Za-z]*, signal 9' 10
	workers 3
	for pid in $workers; do
		only_worker "$pid"
		wait_for 5 'page /status && grep answers page && {
			client a "send GET http://$origin/ HTTP/1.1\nHost: x\n\n ; answer"
			grep "^HTTP/1.1 403" a; } && [ -s file ]' > /dev/null ||
			fail "has not read them: $(head -n 1 a)"
		all_go
	done
	wait_for 5 '[ "$(grep -c " 403 " file)" -ge 3 ]' || fail "$(cat file)"
	lacks old ' 403 '
	counts 1 err 'the old rules stay in force'
	stop_proxy
}

test_worker_drain() { # TERM: all workers drain, a second one ends them at once
	for again in no yes; do
		start_proxy -j 3
		workers 3
		origin slow 'head ; touch asked ; await go ; say 200 | ok'
		client_bg a "send GET http://$origin/ HTTP/1.1\nHost: x\n\n ; answer"
		comes asked
		kill -TERM "$proxy_pid"
		closed
		kill -0 "$proxy_pid" || fail "does not wait"
		if [ $again = yes ]; then
			kill -TERM "$proxy_pid"
			ended_well 4
		else
			touch go
			ended_well 10
			has a '^HTTP/1.1 200 OK'
		fi
		for pid in $workers; do
			! kill -0 "$pid" 2> /dev/null || fail "worker $pid is left"
		done
		rm -f asked go
	done
	counts 1 log 'end=stop'
}

test_worker_orphans() { # if the supervisor is killed, the workers end
	start_proxy -j 2
	workers 2
	kill -KILL "$proxy_pid"
	for pid in $workers; do
		wait_for 10 '! kill -0 "$pid" 2> /dev/null' || fail "$pid is left"
	done
	has err 'worker 1: the supervisor .* has died'
	: > .proxies
}

test_worker_notify() { # a service manager hears of the supervisor only, when all are ready
	plain_origin
	spawn told "$peer" logger "$T/notify" 99
	has told ready
	echo allow > rules
	NOTIFY_SOCKET=$T/notify
	export NOTIFY_SOCKET
	start_proxy -j 3 -f rules
	unset NOTIFY_SOCKET
	has told READY=1
	workers 3
	echo deny > rules
	kill -HUP "$proxy_pid"
	counts 2 told READY=1
	for pid in $workers; do
		only_worker "$pid"
		want 403 GET "http://$origin/"
		all_go
	done
	stop_proxy
	counts 1 told RELOADING=1
	counts 1 told STOPPING=1
	counts 2 told READY=1
}

test_worker_cache() { # what one worker has stored is a hit in the others
	origin o 'replies 200 Cache-Control: max-age=999\n | hello'
	start_cache -j 3
	workers 3
	only_worker "${workers%% *}"
	asks GET "http://$origin/"
	last_line 'miss=stored'
	for pid in $workers; do
		all_go
		only_worker "$pid"
		asks GET "http://$origin/"
		last_line 'hit=fresh'
	done
	all_go
	wait_for 5 'metric "proxy_exchanges_total{result=\"hit\"}" 3' ||
		fail "$(grep exchanges_total page)"
}

test_worker_cache_killed() { # what a killed worker was storing goes, what others store stays
	start_cache -j 2
	workers 2
	first=${workers%% *} second=${workers#* }
	second=${second%% *}
	n=0
	for pid in $first $second; do
		only_worker "$pid"
		n=$((n + 1))
		origin o$n "head ; say 200 Cache-Control: max-age=9\nContent-Length: 6 | abc ; touch half$n ; await go ; send def"
		client_bg c$n "send GET http://$origin/ HTTP/1.1\nHost: x\n\n ; answer"
		comes half$n
		wait_for 5 '[ "$(find cache -name "tmp.*" | wc -l)" = '$n' ]' ||
			fail "no file for $n"
		all_go
	done
	kill -KILL "$second"
	has err 'has ended: [A-Za-z]*, signal 9' 10
	workers 2
	wait_for 5 '[ -z "$(find cache -name "tmp.$second.*")" ]' ||
		fail "its file is still there"
	[ -n "$(find cache -name "tmp.$first.*")" ] || fail "so is the other's"
	touch go
	ends c1 '^open$'
	has c1 'abcdef'
	wait_for 5 '[ "$(entries | wc -l)" = 1 ]' || fail "$(entries)"
	nothing_left
}

# Three clients at once, which all get entries of their own.
overfill_three() {
	for from in 1 2 3; do
		awk -v from="$from" -v n="$1" 'BEGIN {
			for (i = 0; i < n; i++)
				printf "ask /%d-%d X-A: 1\n", from, i
		}' > "three$from.steps"
		client_bg "three$from" < "three$from.steps"
	done
	ends three1 three2 three3 '^open$'
}

test_worker_cache_size() { # the directory is never larger than -s, however many write
	start_cache -j 3 -s 1M
	workers 3
	for what in '20000 30' '250000 5' '10 140'; do
		many_origin "${what% *}"
		overfilled "$what" overfill_three "${what#* }"
	done
	# Only one sweeps; it hears of what the others lack.
	all_go
	many_origin 20000
	for pid in $workers; do
		only_worker "$pid"
		get_many 1 5
		all_go
		wait_for 20 'get_many 900 903; grep hit=fresh log > /dev/null' ||
			fail "worker $pid can't store any more"
	done
	served
	lacks err 'has ended'
}

# So many requests of so many clients at once: crowd CLIENTS REQUESTS
crowd() {
	awk -v clients="$1" -v n="$2" 'BEGIN {
		for (k = 1; k <= clients; k++) {
			if (k > 1)
				print "dial"
			for (i = 0; i < n; i++)
				printf "send GET http://%%O/%d HTTP/1.1\\nHost: %%O\\nUser-Agent: \\{%d:%c}\\n\\n\n",
					i, i * 13 % 900, 97 + k
		}
		for (k = 1; k <= clients; k++) {
			print "over " k
			for (i = 0; i < n; i++)
				print "answer"
		} }' | client crowd
	came_to crowd open
}

test_worker_log() { # the lines of several workers are whole, in a file and in a pipe
	plain_origin
	start_proxy -j 4 -o "$T/file"
	crowd 12 40
	stop_proxy
	pipe_open pipe
	cat <&9 > piped &
	echo $! >> .pids
	start_proxy -j 4 -o "$T/pipe"
	crowd 12 40
	stop_proxy
	for file in file piped; do
		wait_for 5 '[ "$(wc -l < $file)" -ge 480 ]' ||
			fail "$file: $(wc -l < $file) lines"
		grep -v '^127.0.0.1 - - \[[^]]*\] "GET http://[0-9.:]*/[0-9]* HTTP/1.1" 200 2 "-" "[a-z-]*[.]*" up=0 dns=[0-9-]* connect=[0-9-]* first=[0-9-]* total=[0-9]* server=[0-9.:]* end=done$' \
			"$file" > odd && fail "$file: $(head -n 1 odd)"
		awk -F '"' '$6 !~ "^[" substr($6, 1, 1) "]+[.]*$"' "$file" > odd
		[ ! -s odd ] || fail "$file: $(head -n 1 odd)"
		counts 480 "$file" end=done
	done
}

test_worker_log_stalls() { # a pipe that nobody reads stops no worker
	plain_origin
	pipe_open stalled
	"$proxy_bin" -j 2 -l 127.0.0.1:0 > stalled 2> err &
	proxy_pid=$!
	echo "$proxy_pid" >> .proxies
	proxy=$("$peer" banner err "$proxy_pid") || fail "$(cat err)"
	crowd 4 100
	has err "log can't be written" 5
	served
	stop_proxy
}

test_worker_full() { # -m is for all workers; a full one leaves clients to others
	start_proxy -j 2 -m 20
	plain_origin
	workers 2
	wait_for 5 'metric proxy_connections_limit 20' || fail "$(grep limit page)"
	awk 'BEGIN { while (n++ < 16) print (n > 1 ? "dial ; " : "") "ask /"
	print "touch held ; await free"
	for (n = 1; n <= 16; n++)
		print "over " n " ; ask /" }' | client_bg hold
	comes held
	served
	touch free
	ends hold '^open$'
	counts 32 hold "HTTP/1.1 200 OK"
	lacks err 'are in use'
	stop_proxy
	start_proxy -j 3 -m 1
	workers 3
	wait_for 5 'metric proxy_connections_limit 24' || fail "$(grep limit page)"
}

test_worker_refused() { # -j with -i, -w or a command, or out of range: one clear line
	says <<'END'
2 -j 2 -w "$T/har" = ^proxy: -j: several processes .*-w$
2 -j 2 -i = ^proxy: -j: several processes .*-i$
2 -j 2 -- true = ^proxy: -j: several processes .*--$
2 -j 0 = ^proxy: -j 0: not a number from 1 to 64
2 -j 65 = ^proxy: -j 65: not a number from 1 to 64
2 -j x = ^proxy: -j x: not a number from 1 to 64
0 -n -j 64
END
	# One is as without.
	start_proxy -j 1
	[ -z "$(ps -A -o ppid= -o args= | awk -v of="$proxy_pid" '$1 == of' |
		sed 1d)" ] || fail "more than a helper"
	page /status
	lacks page 'answers:'
}

test_worker_socket() { # a UNIX socket goes when all workers stop, and can be used again
	start_proxy -j 2 -l "$T/sock" -l 127.0.0.1:0
	workers 2
	[ -S sock ] || fail "no socket"
	kill -KILL "${workers%% *}"
	has err 'has ended' 10
	[ -S sock ] || fail "no socket any more"
	workers 2
	stop_proxy
	[ ! -e sock ] || fail "the socket is left"
}

# ---- 28. Options and listeners ----------------------------------------------

test_start_banner() { # the banner names what is bound, with lines to paste
	start_proxy
	said <<'END'
= proxy: listening on %P
~ curl -x http://%P http
~ http_proxy=http://%P https_proxy=http://%P
!~ a rule lets
END
	"$peer" client "$proxy" c < /dev/null
	[ "$(cat c.end)" = open ] || fail "nothing listens on $proxy"
	served
}

test_start_addresses() { # several -l, port 0, [::1], the warning beyond loopback
	have_ipv6 || skip "no IPv6 on loopback"
	start_proxy -l 127.0.0.1:0 -l '[::1]:0'
	served
	wait_for 5 'grep "listening on .::1" err > listening' ||
		fail "no banner line for [::1]"
	served "$(sed 's/.* on //' listening)"
	stop_proxy
	name=any start_proxy -l :0
	has any.err 'a rule lets them in'
	served "127.0.0.1:${proxy##*:}"
}

test_start_mapped() { # -l with an IPv4-mapped IPv6 address listens on the IPv4 address
	start_proxy -l '[::ffff:127.0.0.1]:0'
	case $proxy in
	127.0.0.1:*) ;;
	*) fail "it listens on $proxy" ;;
	esac
	served
}

test_start_usage() { # bad options: one clear line, one of usage, exit 2
	each_line > lines <<'END'
-q | -l 127.0.0.1:65536 | -l 127.0.0.1:99999999999 | -l 127.0.0.1:-1
-l 127.0.0.1:80x | -l | -m 0 | -m x | -m -1 | -m 99999999999999999999 | -t 0
-t 1s | -x ftp://127.0.0.1:21 | -x http:// | -x http://127.0.0.1:0
-x socks5://127.0.0.1:65536 | -x nonsense | -b not-an-address
-l 127.0.0.1:0 operand
END
	while read -r options; do
		# shellcheck disable=SC2086 # options are words
		exits 2 $options
		{ read -r first && read -r second; } < errors || second=
		case $options:$first:$second in
		-[xb]*:'proxy: '?* | *:'proxy: '?*:*[Uu]sage*) ;;
		*) fail "$options: says $(cat errors)" ;;
		esac
		[ ! -s out ] || fail "$options: writes to standard output"
	done < lines
}

test_start_failures() { # what fails: one clear line with what to do about it, exit 1 or 2
	start_proxy
	says <<END
2 -s 1M = -s: .*-c
1 -l 127.0.0.1:0 -o $T/none/log = ^proxy: .*$T/none/log: ..*
1 -l $T/none/socket
1 -l $proxy = ^proxy: .*$proxy.*in use.*-l
END
	counts 1 errors ''
	served
	[ "$(id -u)" = 0 ] || skip "the rest needs root"
	exits 1 -l 127.0.0.1:0 -u no-such-user-here
	has errors "^proxy: .*no-such-user-here"
	counts 1 errors ''
}

test_start_help() { # -h and -V print to standard output and exit 0
	exits 0 -h
	grep -i '^usage' out > /dev/null || fail "-h prints no usage"
	for option in l o x b a m t u v V h; do
		grep -e "-$option" -e "-[a-zA-Z]*$option" out > /dev/null ||
			fail "-h does not know -$option"
	done
	exits 0 -V
	head -n 1 out | grep '^proxy [0-9]' > /dev/null ||
		fail "-V prints $(head -n 1 out)"
	has out '^buffer [0-9][0-9]*'
}

test_start_unix_socket() { # a UNIX socket: served, logged as unix, usable again
	start_proxy -l "$T/p.sock"
	[ "$proxy" = "$T/p.sock" ] || fail "banner says $proxy"
	play 'over a UNIX socket' <<'END'
	reply  200 | ok
	ask    / = 200 OK | ok
	log    ^unix - - \[DATE\] "GET http://%O/ HTTP/1.1" 200 2 .* end=done
END
	stop_proxy
	start_proxy -l "$T/p.sock"
	served
}

test_start_user() { # -u: another user after binding; -n checks that there is one
	exits 1 -n -u no.such.user
	has errors 'no.such.user: no such user'
	[ "$(id -u)" = 0 ] || skip "only root can become another user"
	chmod 755 "$T"
	start_proxy -u 65534
	uid=$(ps -o uid= -p "$proxy_pid" 2> /dev/null | tr -d ' ') ||
		skip "no ps -o uid"
	[ "$uid" = 65534 ] || fail "runs as ${uid:-?}"
	served
}

test_start_one_family() { # of two addresses one is taken: it says so and serves on the other
	address_here ::1 || skip "no IPv6"
	origin six -a ::1 < /dev/null
	port=$origin_port
	start_proxy -l "$port"
	has err "^proxy: not listening on \[::1\]:$port: "
	served
	stop_proxy
	start_proxy -l ":$port"
	has err "^proxy: not listening on \[::\]:$port: "
	proxy=127.0.0.1:$port
	served
}

test_start_no_address() { # of two addresses one is taken, one not ours: the first is said
	origin o 'eof'
	NAME_ADDRESSES="127.0.0.1 192.0.2.77"
	our_names
	exits 1 -l "two.test:$origin_port"
	has errors 'try another port'
}

test_start_user_log() { # with -u, log and cache belong to the user, and HUP works
	[ "$(id -u)" = 0 ] || skip "not root"
	chmod 755 "$T" "$work"
	mkdir logs
	start_proxy -u nobody -o "$T/logs/log" -c "$T/cache"
	served
	# shellcheck disable=SC2012 # names are known
	[ "$(ls -ld logs/log cache cache/CACHEDIR.TAG | awk '{ print $3 }' |
	    sort -u)" = nobody ] || fail "not its own: $(ls -ld logs/log cache)"
	kill -HUP "$proxy_pid"
	served
	lacks err 'log'
	mv logs/log logs/log.1
	: > logs/log
	chown nobody logs/log
	kill -HUP "$proxy_pid"
	"$peer" sleep 100
	served
	wait_for 5 '[ -s logs/log ]' || fail "the new log is empty"
}

test_start_sockets() { # LISTEN_FDS: sockets of a service manager are used
	"$peer" launch listen where "$proxy_bin" > log 2> err &
	proxy_pid=$!
	echo "$proxy_pid" >> .proxies
	has err "^proxy: listening on"
	proxy=$(cat where)
	has err "^proxy: listening on $proxy\$"
	grep -c '^proxy: listening on' err | grep -x 1 > /dev/null ||
		fail "it listens elsewhere, too: $(cat err)"
	served
	stop_proxy
	for fds in x 99 -1 1000000; do
		LISTEN_FDS=$fds "$peer" launch listen where "$proxy_bin" 2> err &&
			fail "LISTEN_FDS=$fds is taken"
		has err '^proxy: LISTEN_FDS: .* is not a number'
	done
	"$peer" launch wrong where "$proxy_bin" 2> err && fail "a pipe is taken"
	has err '^proxy: LISTEN_FDS: descriptor 3: '
	# Of another process: not ours.
	LISTEN_PID=1 LISTEN_FDS=1 "$proxy_bin" -n || fail "another's are taken"
	# Who shares it shuts it down: said once, and the rest goes on.
	"$peer" launch shut where "$proxy_bin" -l 127.0.0.1:0 > log 2> two.err &
	proxy_pid=$!
	echo "$proxy_pid" >> .proxies
	has two.err "^proxy:   export"
	: > shut
	has two.err "^proxy: $(cat where) takes no more clients: "
	proxy=$(sed -n 's/^proxy: listening on //p' two.err | tail -n 1)
	served
	rests "with a listener that is shut down"
	counts 1 two.err 'takes no more'
	stop_proxy
	# One that takes IPv4 too is ours at all addresses.
	have_ipv6 || return 0
	"$peer" launch both where "$proxy_bin" > log 2> err &
	proxy_pid=$!
	echo "$proxy_pid" >> .proxies
	has err "^proxy: listening on"
	proxy=$(cat where)
	printf 'ask CONNECT %s\n' "$proxy" | client loop "$proxy"
	has log '" 508 .* why="this address is the proxy.s own"'
}

test_start_notify() { # NOTIFY_SOCKET: ready, reloading, stopping
	for socket in "$T/notify" "@proxy-test-$$"; do
		case $socket in
		@*) [ -f /proc/net/unix ] || continue ;;
		esac
		spawn told "$peer" logger "$socket" 99
		receiver=$spawned
		has told ready
		export NOTIFY_SOCKET="$socket"
		start_proxy -e 'allow client local'
		unset NOTIFY_SOCKET
		has told READY=1
		kill -HUP "$proxy_pid"
		counts 2 told READY=1
		grep -A 1 '^RELOADING=1' told | grep '^MONOTONIC_USEC=[0-9]' \
			> /dev/null || fail "$(cat told)"
		stop_proxy
		has told "^STOPPING=1"
		kill "$receiver"
		rm told
	done
	NOTIFY_SOCKET=$T/nobody "$proxy_bin" -n || fail "nobody there"
}

test_start_inetd() { # -i: serves the client that is standard input, and ends
	spawn inetd.out "$peer" launch inetd where "$proxy_bin" -i -v -o "$T/log"
	wait_for 5 '[ -s where ]' || fail "no inetd"
	proxy=$(cat where)
	proxy_pid=$spawned
	inetd=$spawned
	play -n 'two requests' <<'END'
	reply  200 | one
	reply  200 | two
	ask    / = 200 | one
	ask    / = 200 | two
END
	wait_exit "$inetd" 5
	[ "$wait_status" = 0 ] || fail "it ends with $wait_status"
	proxy_pid=
	"$proxy_bin" -i < /dev/null 2> err && fail "a file is taken"
	has err '^proxy: -i: standard input is no connected socket'
}

test_start_waits() { # -l with an address that is not there: said once, then given up
	quick
	exits 1 -l 192.0.2.77:8080
	counts 1 errors '^proxy: waiting for the address 192.0.2.77:8080'
	has errors "^proxy: can't listen on 192.0.2.77:8080"
}

test_start_user_links() { # with -u, nothing is given to the user through a link
	[ "$(id -u)" = 0 ] || skip "not root"
	chmod 755 "$T" "$work"
	mkdir logs
	chown nobody logs
	: > secret
	ln -s "$T/secret" logs/soft
	ln secret logs/hard
	for link in soft hard; do
		start_proxy -u nobody -o "$T/logs/$link"
		# shellcheck disable=SC2012 # names are known
		[ "$(ls -l secret | awk '{ print $3 }')" = root ] ||
			fail "$link: given away"
		has err "logs/$link is a link"
		stop_proxy
	done
}

test_start_user_reload() { # with -u, files that the user can't read again or write are named at the start
	[ "$(id -u)" = 0 ] || skip "not root"
	chmod 755 "$T" "$work"
	echo ads.example > list
	printf 'u:p\n' > users
	chmod 600 list users
	start_proxy -u nobody -e "users $T/users" -e "deny list $T/list"
	has err "^proxy: .*$T/users: Permission denied"
	has err "^proxy: .*$T/list: Permission denied"
	has err '^proxy: user nobody can.t read the rules again'
	stop_proxy
	chown nobody list users
	mkdir -p cache/ab
	mkdir tmp
	start_proxy -c "$T/tmp" -u nobody -e "users $T/users"
	lacks err 'rules again'
	stop_proxy
	mkdir tmp/ab
	start_proxy -c "$T/tmp" -u nobody
	has err "^proxy: user nobody can.t write $T/tmp/ab: chown -R nobody"
}

test_start_exposed() { # the hint about clients from elsewhere stays until a rule lets some in
	for rule in 'allow client local' 'allow client 127.0.0.0/8 ::1' \
	    'deny client 192.0.2.1' 'allow port 80 client local'; do
		start_proxy -l 0.0.0.0:0 -e "$rule"
		has err 'clients that are not on this machine are refused'
		stop_proxy
	done
	for rule in 'allow client 192.0.2.0/24' 'allow not client 192.0.2.1' \
	    'allow client local 192.0.2.1' allow 'allow client 0.0.0.0/0'; do
		start_proxy -l 0.0.0.0:0 -e "$rule"
		served "127.0.0.1:${proxy##*:}"
		lacks err 'clients that are not on this machine are refused'
		stop_proxy
	done
}

test_start_path_used() { # a UNIX socket in use: the message says what to do
	start_proxy -l "$T/socket"
	# The owner of the other one does not accept anybody.
	spawn full "$peer" full "$T/full.sock"
	has full ready
	says <<END
1 -l $T/socket = in use; try another path with -l
1 -l $T/full.sock = in use; try another path with -l
END
}

# ---- 29. Main: start, a command ---------------------------------------------

# Runs the proxy with a command, for ten seconds: sets $status, files out, err.
command_proxy() {
	"$proxy_bin" "$@" > out 2> err < /dev/null &
	wait_exit $! 10
	status=$?
}

test_command_run() { # -- COMMAND: it finds the proxy, has its own output, and its status is the proxy's
	origin o 'replies 200 | hello'
	cat > script <<'END'
echo "out $1"
echo "http_proxy=$http_proxy https_proxy=$https_proxy HTTPS_PROXY=$HTTPS_PROXY"
echo "no=$no_proxy$NO_PROXY."
printf 'ask http://%s/\nask http://%s/\n' "$ORIGIN" "$ORIGIN" |
	"$PEER" client "${http_proxy#http://}" c
exit 5
END
	ORIGIN=127.0.0.1:$origin_port PEER=$peer NO_PROXY=x \
	    command_proxy -- sh script "a b"
	[ $status = 5 ] || fail "status $status: $(cat err)"
	sed -n 1p out | grep '^out a b$' > /dev/null || fail "out: $(cat out)"
	url=$(sed -n 's/^proxy: listening on /http:\/\//p' err)
	[ "$(sed -n 2p out)" = "http_proxy=$url https_proxy=$url HTTPS_PROXY=$url" ] ||
		fail "environment: $(cat out), $url"
	[ "$(sed -n 3p out)" = no=. ] || fail "no_proxy: $(cat out)"
	counts 2 err '" 200 5 .* end=done'
	tail -n 1 err | grep '^proxy: 2 requests, 0 refused or failed, 0 from the cache, 0 bytes up, 10 down$' \
	    > /dev/null || fail "sum: $(tail -n 1 err)"
	ORIGIN=127.0.0.1:$origin_port PEER=$peer \
	    command_proxy -o "$T/file" -- sh script
	counts 2 file end=done
	lacks err end=done
	command_proxy -o - -l 0.0.0.0:0 -- sh -c 'echo "$http_proxy"'
	has out '^http://127.0.0.1:[1-9]'
}

test_command_status() { # -- COMMAND: 126, 127, 128 + n, and no command at all
	command_proxy -- /nonexistent/command
	[ $status = 127 ] || fail "no such command: $status"
	has err "^proxy: can't run /nonexistent/command: No such"
	command_proxy -- "$T"
	[ $status = 126 ] || fail "a directory: $status"
	command_proxy -- sh -c 'kill -KILL $$'
	[ $status = 137 ] || fail "killed: $status"
	command_proxy --
	[ $status = 2 ] || fail "no command: $status"
	command_proxy -l "$T/socket" -- true
	[ $status = 1 ] && grep 'path only' err > /dev/null ||
		fail "a path: $status, $(cat err)"
	command_proxy sh -c true
	[ $status = 2 ] || fail "without --: $status"
}

test_command_signals() { # -- COMMAND: TERM reaches it, and the proxy waits for its end
	cat > script <<'END'
trap 'echo term; "$PEER" sleep 300; echo end; exit 3' TERM
touch ready
while :; do "$PEER" sleep 50; done
END
	PEER=$peer "$proxy_bin" -- sh script > out 2> err < /dev/null &
	proxy_pid=$!
	echo "$proxy_pid" >> .proxies
	comes ready
	kill -TERM "$proxy_pid"
	wait_exit "$proxy_pid" 10
	[ "$wait_status" = 3 ] || fail "status $wait_status"
	[ "$(tr '\n' ' ' < out)" = "term end " ] || fail "out: $(cat out)"
	: > .proxies
}

test_command_rest() { # -- COMMAND: what it left under way gets a second, no more
	origin o 'head ; send HTTP/1.1 200 OK\nContent-Length: 10\n\nhello ; stall 9000'
	cat > script <<'END'
printf 'send GET http://%s/ HTTP/1.1\\nHost: x\\n\\n\nuntil hello\ntouch got\neof\n' "$ORIGIN" |
	"$PEER" client "${http_proxy#http://}" c > /dev/null 2>&1 &
while [ ! -f got ]; do "$PEER" sleep 20; done
exit 0
END
	began=$("$peer" clock)
	ORIGIN=127.0.0.1:$origin_port PEER=$peer command_proxy -- sh script
	[ $status = 0 ] || fail "status $status: $(cat err)"
	[ $(($("$peer" clock) - began)) -lt 6000 ] || fail "it waits for long"
	has err '" 200 5 .* end=stop'
	# A signal meanwhile ends it at once, with the command's status.
	rm got
	sed 's/^exit 0/( "$PEER" sleep 300; kill -TERM "$PPID" ) \&\nexit 3/' script > again
	ORIGIN=127.0.0.1:$origin_port PEER=$peer command_proxy -- sh again
	[ $status = 3 ] || fail "after a signal: status $status: $(cat err)"
	has err '^proxy: 1 requests'
}

test_command_given() { # -- COMMAND: it has the descriptors, limits and signals that the proxy got, and an address that it can use
	# shellcheck disable=SC2016 # the command expands it
	(
		trap '' HUP
		exec 7> seven
		command_proxy -l proxy:127.0.0.1:0 -l 127.0.0.1:0 -c cache \
		    -o log -- sh -c 'for fd in 3 4 5 6 7 8 9; do
			(: >&$fd) 2> /dev/null && echo $fd >&7
		    done
		    kill -HUP $$; echo "$http_proxy"'
	)
	[ "$(cat seven)" = 7 ] || fail "descriptor 7: $(cat seven err)"
	url=http://$(sed -n '2s/^proxy: listening on //p' err)
	[ "$(cat out)" = "$url" ] || fail "not $url: $(cat out err)"
	command_proxy -l proxy:127.0.0.1:0 -- true
	[ $status = 1 ] && grep 'PROXY headers' err > /dev/null ||
		fail "PROXY headers only: $status, $(cat err)"
	# shellcheck disable=SC3045 # where it is missing, nothing is tested
	(ulimit -S -n 99 2> /dev/null && command_proxy -- sh -c 'ulimit -S -n' &&
		cp out files)
	[ ! -f files ] || [ "$(cat files)" = 99 ] || fail "$(cat files) files"
	# Signals stay blocked for it, but not for the proxy.
	"$peer" blocked "$proxy_bin" -- sh -c 'kill -USR1 $$; echo goes on' \
	    > out 2> err || fail "blocked signals: $? $(cat err)"
	has out 'goes on'
	proxy_wrap="$peer blocked" start_proxy
	stop_proxy
}

test_command_hangup() { # -- COMMAND: it may outlive its terminal, and the proxy waits for it
	plain_origin
	cat > script <<'END'
trap '' HUP
while [ -t 1 ]; do "$PEER" sleep 50; done
"$PEER" sleep 200
printf 'ask http://%s/\n' "$ORIGIN" | "$PEER" client "${http_proxy#http://}" c
END
	ORIGIN=$origin PEER=$peer "$peer" terminal "$proxy_bin" -o "$T/log" -- \
	    /bin/sh script
	case $? in
	0) ;;
	77) skip "no terminals here" ;;
	*) fail "status $?" ;;
	esac
	has c '^HTTP/1.1 200'
	has log "GET http://$origin/"
}

test_command_names() { # -- COMMAND: a look-up that hangs does not keep its output open
	our_names
	cat > script <<'END'
printf '%s\n' 'send GET http://slow.test/ HTTP/1.1\nHost: x\n\n' 'stall 300' |
	"$PEER" client "${http_proxy#http://}" c
END
	PEER=$peer spawn all sh -c "'$proxy_bin' -- sh script 2>&1 | cat"
	wait_exit "$spawned" 20
	grep '1 requests' all > /dev/null && [ "$wait_status" = 0 ] ||
		fail "$wait_status: $(cat all)"
}

test_command_sweep() { # -- COMMAND: a sweep that takes long does not keep its output open
	our_names
	many_origin 20000
	cat > script <<'END'
: > walk-halted
awk 'BEGIN { while (n++ < 5) print "ask http://'"$ORIGIN"'/" n " X-A: 1" }' |
	"$PEER" client "${http_proxy#http://}" c
END
	ORIGIN=$origin PEER=$peer spawn all sh -c \
	    "'$proxy_bin' -c cache -s 1M -- sh script 2>&1 | cat"
	wait_exit "$spawned" 15
	rm walk-halted
	grep '5 requests' all > /dev/null && [ "$wait_status" = 0 ] ||
		fail "$wait_status: $(cat all)"
}

test_command_pipe() { # -- COMMAND: what it writes to a pipe that nobody reads stops no request
	our_names
	plain_origin
	pipe_open words
	cat > script <<'END'
: > words-filled
printf 'ask http://%s/\nask http://%s/\n' "$ORIGIN" "$ORIGIN" |
	"$PEER" client "${http_proxy#http://}" c
END
	ORIGIN=$origin PEER=$peer "$proxy_bin" -- sh script 2> words 9<&- &
	wait_exit $! 15 || fail "exit status $?"
	counts 2 c '^HTTP/1.1 200'
}

test_signals_early() { # while it starts, TERM ends it, and HUP and USR1 do not
	"$proxy_bin" -l 192.0.2.77:8080 > out 2> err &
	has err 'waiting for the address'
	kill -TERM $!
	wait_exit $! 5
	[ "$wait_status" = 143 ] || fail "TERM: it waits on, $wait_status"
	have mkfifo && mkfifo rules || skip "no mkfifo"
	"$proxy_bin" -l 127.0.0.1:0 -f rules > log 2> err &
	echo $! >> .pids
	exec 9> rules
	kill -HUP $!
	kill -USR1 $!
	"$peer" sleep 100
	echo 'deny port 9' >&9
	exec 9>&-
	has err '^proxy: listening on '
}

test_signal_term_unix() { # a second TERM leaves the socket of the next proxy at the same path
	origin o 'head ; touch asked ; await go ; say 200 | ok'
	start_proxy -l "$T/sock"
	proxy=$T/sock
	client_bg c 'ask /'
	comes asked
	old=$proxy_pid
	kill -TERM "$old"
	wait_for 5 '[ ! -e sock ]' || fail "the socket stays"
	name=new start_proxy -l "$T/sock"
	kill -TERM "$old"
	wait_exit "$old" 10
	[ -S sock ] || fail "the socket of the next proxy is gone"
}

test_signals_terminal() { # HUP ends a proxy whose terminal is gone
	for n in 1 2; do
		"$peer" terminal "$proxy_bin" -j $n -l 127.0.0.1:0
		case $? in
		0) ;;
		77) skip "no terminals here" ;;
		*) fail "it goes on, -j $n" ;;
		esac
	done
}

test_signal_stop() { # stopped for longer than a time limit: what came meanwhile is served
	quick
	play 'a new client, and a kept one' <<'END'
	replies 200 | ok
	a: stall 200 ; touch new ; await new.stopped
	a: ask / = 200 | ok
	a: stall 200 ; touch kept ; await kept.stopped
	a: ask / = 200 | ok
	do comes new; kill -STOP "$proxy_pid"; touch new.stopped
	do "$peer" sleep 1500; kill -CONT "$proxy_pid"
	do comes kept; kill -STOP "$proxy_pid"; touch kept.stopped
	do "$peer" sleep 1500; kill -CONT "$proxy_pid"
END
}

test_signal_term() { # TERM: what is in flight finishes, exit 0, nothing new
	play -n 'an answer on its way' <<'END'
	origin head ; touch asked ; await go ; say 200 | ok
	a: ask / = 200 OK | ok
	a: sees+ -- end open
	do comes asked
	do kill -TERM "$proxy_pid"
	do closed
	do touch go
	log    "GET http://%O/ HTTP/1.1" 200 2 .* end=done
END
	ended_well 10
}

test_signal_term_limit() { # the drain is bounded; the log says stop
	quick
	play -n 'a tunnel' <<'END'
	origin eof
	a: ask CONNECT %O
	a: touch open ; eof
	do comes open
	do kill -INT "$proxy_pid"
	do ended_well 10
	log    "CONNECT %O HTTP/1.1" 200 .* end=stop
END
}

test_signal_term_twice() { # a second TERM exits at once, and the log is complete
	play -n 'a tunnel' <<'END'
	origin eof
	a: ask CONNECT %O
	a: touch open ; eof
	do comes open
	do kill -TERM "$proxy_pid"
	do closed
	do kill -0 "$proxy_pid" || fail "does not wait for the tunnel"
	do kill -TERM "$proxy_pid"
	do wait_exit "$proxy_pid" 2; [ $wait_status != 137 ] || fail "still there after the second TERM"
	do proxy_pid=
	log    "CONNECT %O HTTP/1.1" 200 .* end=stop
END
}

test_resources_start() { # at start: under 400 KiB private
	start_proxy
	need_memory
	used=$(private_memory)
	[ "$used" -lt 400 ] || fail "$used KiB"
}

test_resources_size() { # -Os, stripped: under 215 KiB
	sanitized && skip "$special says nothing"
	have strip || skip "no strip"
	linked -o small || fail "$(head -n 1 cc.out)"
	strip small || skip "strip cannot strip"
	size=$(wc -c < small)
	[ "$size" -lt 220160 ] || fail "$size bytes"
}

# ---- 30. Style --------------------------------------------------------------

test_style_limits() { # LIMITS in the manual has the figures that -V prints
	"$proxy_bin" -V > version
	[ "$(sed -n 's/^slot //p' version)" -le 480 ] || fail "$(grep slot version)"
	while IFS='|' read -r name text; do
		value=$(sed -n "s/^$name //p" version)
		case $name in
		*-ms) value=$((value / 1000))' s' ;;
		# Small buffers have fewer; the smallest has a sentence of its own.
		fields) [ "$buffer" -ge 12800 ] || continue ;;
		esac
		has "$here/proxy.1" "^\.It $text .* ${value}[ ,]"
	done <<'END'
fields|fields in a head
head-ms|whole head of a request
connect-ms|connecting, all addresses
idle-ms|idle body, idle tunnel
half-closed-ms|half-closed tunnel, idle
kept-client-ms|idle kept connection to a client
kept-server-ms|idle kept connection to a server
collapse-ms|waiting for a fetch under way
linger-ms|after the last response
name-ms|a name is remembered
name-failed-ms|a name is remembered
END
	[ "$buffer" != 4096 ] ||
		has "$here/proxy.1" " $(sed -n 's/^fields //p' version) fields\.$"
	# All but drain-ms, of SIGNALS.
	counts 11 version '-ms '
}

need_source() {
	[ -f "$here/proxy.c" ] || skip "no proxy.c beside test.sh"
}

test_style_functions() { # none over 60 lines, nine in ten under 30, median under 14
	need_source
	# The name stands at column 0, the braces too; counted are the lines
	# between the braces with them.
	awk '/^[a-z_]+\(/ { name = $0 } /^\{/ { start = NR }
	/^\}/ && start { print NR - start + 1, name; start = 0 }' \
	    "$here/proxy.c" | sort -n > lengths
	count=$(wc -l < lengths)
	[ "$count" -gt 50 ] || fail "found $count functions only"
	long=$(tail -n 1 lengths)
	[ "${long%% *}" -le 60 ] || fail "too long: $long"
	ninth=$(sed -n "$((count * 9 / 10))p" lengths)
	[ "${ninth%% *}" -lt 30 ] || fail "nine in ten: $ninth"
	median=$(sed -n "$(((count + 1) / 2))p" lengths)
	[ "${median%% *}" -lt 14 ] || fail "median: $median"
}

test_style_lines() { # 80 columns, no blanks at ends, no // comments, no #if
	need_source
	expand "$here/proxy.c" > wide
	awk 'length($0) > 80 { print FNR }' wide > found
	[ ! -s found ] || fail "over 80 columns: lines $(head -n 5 found)"
	grep -n '[ 	]$' "$here/proxy.c" > found &&
		fail "blanks at the end: $(head -n 1 found)"
	grep -n '^  *[a-z]' "$here/proxy.c" | grep -v ':    ' > found &&
		fail "indented by blanks: $(head -n 1 found)"
	sed 's/"[^"]*"//g' "$here/proxy.c" | grep -n '//' |
	    grep -v ':[ 	/]*\*' | grep -v 'http:\|://' > found &&
		fail "// comment: $(head -n 1 found)"
	awk '/^\/\* ---- 2\. / { on = 1 }
	on && /^[ \t]*#[ \t]*(if|ifdef|ifndef|else|elif)/ { print FNR ": " $0 }' \
	    "$here/proxy.c" > found
	[ ! -s found ] || fail "#if after section 1: $(head -n 1 found)"
	grep '^/\* ---- 2\. ' "$here/proxy.c" > found || fail "no section 2"
}

# Prints the code of proxy.c as it is numbered, without its comments and strings.
write_code() {
	sed -e 's/"\([^"\\]\|\\.\)*"/""/g' "${1-$here/proxy.c}" | awk '
	{ while (1) {
		if (inside) {
			i = index($0, "*/")
			if (!i) { $0 = ""; break }
			$0 = substr($0, i + 2); inside = 0
		}
		i = index($0, "/*")
		if (!i) break
		rest = substr($0, i + 2)
		j = index(rest, "*/")
		if (j) $0 = substr($0, 1, i - 1) " " substr(rest, j + 2)
		else { $0 = substr($0, 1, i - 1); inside = 1; break }
	  } print }'
}

test_style_banned() { # calls and words that proxy.c does without
	need_source
	write_code > code
	for word in goto strcpy strcat strncpy strncat sprintf vsprintf gets \
	    atoi atol atoll strtok sscanf scanf alloca splice sendfile \
	    accept4 memmem setjmp longjmp system popen gethostbyname err errx \
	    warnx select posix_fallocate; do
		grep -n "\(^\|[^a-z_0-9.>]\)$word *(" code > found &&
			fail "$word: $(head -n 1 found)"
	done
	grep -n 'goto ' code > found && fail "goto: $(head -n 1 found)"
	grep -n 'epoll_\|kqueue\|pthread\|typedef\|__attribute__\|__builtin' \
	    code > found && fail "$(head -n 1 found)"
	# No meaning by position: limits and phases alone have an order.
	awk '/^enum [a-z_]+ {/ { on = $2 != "limit" && $2 != "phase" }
	/^}/ { on = 0 }
	on && match($0, /[A-Z0-9]+_[A-Z0-9_]+/) {
		print "[<>]=* *" substr($0, RSTART, RLENGTH) "[^A-Z0-9_]" }' \
	    code > ordered
	[ -s ordered ] || fail "no enum is left to look at"
	grep -n -f ordered code > found &&
		fail "by position: $(head -n 1 found)"
	grep main code > found || fail "no code is left to look at"
}

test_style_comments() { # a comment before every function; 15 to 25 % of the lines
	need_source
	# Looks back from a function's name over its type to what is above.
	awk '
	/^[a-z_]+\(/ {
		for (i = NR - 1; i > 0 && line[i] ~ /^[a-z_].*[^;{}]$/; i--)
			;
		if (line[i] !~ /\*\/$/)
			print FNR ": " $0
	}
	{ line[NR] = $0 }' "$here/proxy.c" > found
	bare=$(wc -l < found)
	count=$(grep -c '^[a-z_]*(' "$here/proxy.c")
	[ "$bare" = 0 ] ||
		fail "$bare of $count functions without: $(head -n 3 found)"
	awk '/\/\*/ { inside = 1 } inside { n++ } /\*\// { inside = 0 }
	END { print int(n * 100 / NR) }' "$here/proxy.c" > share
	share=$(cat share)
	[ "$share" -ge 15 ] && [ "$share" -le 25 ] ||
		fail "$share % of the lines are comment"
}

test_style_options() { # usage, getopt and proxy.1 know the same options
	need_source
	[ -f "$here/proxy.1" ] || skip "no proxy.1 beside test.sh"
	run_proxy -h
	sed -n 's/^  -\([a-zA-Z]\) .*/\1/p' < out | sort -u > usage.list
	sed -n 's/^\.It Fl \([a-zA-Z]\).*/\1/p' "$here/proxy.1" |
	    sort -u > manual.list
	sed -n "s/^	{ '\(.\)', [N\"].*/\1/p" "$here/proxy.c" | sort -u > getopt.list
	[ -s getopt.list ] || fail "no table of options found"
	cmp getopt.list manual.list > differ ||
		fail "getopt: $(tr -d '\n' < getopt.list), proxy.1:" \
		    "$(tr -d '\n' < manual.list)"
	cmp getopt.list usage.list > differ ||
		fail "getopt: $(tr -d '\n' < getopt.list), usage:" \
		    "$(tr -d '\n' < usage.list)"
	sed -n '/^\.Sh SYNOPSIS/,/^\.Sh DESC/p' "$here/proxy.1" |
	    sed -n 's/^\.Op Fl \([a-zA-Z]*\).*/\1/p' | fold -w 1 |
	    grep . | sort -u > synopsis.list
	cmp getopt.list synopsis.list > differ ||
		fail "the synopsis has: $(tr -d '\n' < synopsis.list)"
}

# Prints each place of a source that names what belongs to another section and
# is not on its door; then how many sections have a door: doors SOURCE
doors() {
	write_code "$1" > doors.code
	awk '
	FNR == 1 { section = 0 }
	# A part of a section has a banner too, but no number.
	FNR == NR && match($0, /^\/\* ---- [0-9]+\. /) { at[FNR] = substr($0, 9) + 0 }
	FNR in at { section = at[FNR] }
	FNR == NR {
		listing = listing || /^ \* Door: /
		if (listing)
			door[section] = door[section] $0
		listing = listing && !/\.$/ && !/\*\//
		if (/^ \* Door of sections /) {
			first = $5
			for (s = $5 + 0; s <= $7 + 0; s++)
				chapter[s] = $5
		}
		for (i = 2; first && i <= NF; i++)
			if ($i ~ /^[a-z_]+[,.]$/)
				outer[first, substr($i, 1, length($i) - 1)]
		if (/\.$/ && first)
			first = 0
		if (/^struct [a-z_]+ {/)
			tag = $2
		if (/\/\* private to section/) {
			inside = $5 + 0
			last_inside = $6 == "and" ? $7 + 0 : inside
			tags[tag]
		} else if (/^}/)
			inside = 0
		else if (inside && match($0, /[a-z_0-9]+(\[[^]]*\])*;/)) {
			name = substr($0, RSTART, RLENGTH)
			sub(/[[;].*/, "", name)
			member[tag, name] = inside
			upto[tag, name] = last_inside
		}
		if (match($0, /^[a-z_0-9]+\(/))
			home[substr($0, 1, RLENGTH - 1)] = section
		else if (/^(static|}) [^(]*[;=]/) {
			sub(/ *[[;=].*/, "")
			sub(/.*[ *]/, "")
			home[$0] = section
		}
		next
	}
	FNR == 1 {
		for (s in door) {
			doors++
			# "everything here", or all but what is listed then
			open[s] = door[s] ~ /everything here/
			n = split(door[s], words, /[^a-z_0-9]+/)
			for (i = 1; i <= n; i++)
				listed[s, words[i]] = 1
			for (i = 4; i <= n && !open[s]; i++)
				if (words[i] && words[i] < words[i - 1])
					print "proxy.c:0: " words[i] \
					    " is not in its place on the door"
		}
	}
	# Private members are reached by a member, or a variable, of that struct.
	/^}/ { split("", variable) }
	{ line = $0
	while (match(line, /struct [a-z_]+ \**[a-z_]+/)) {
		split(substr(line, RSTART, RLENGTH), words, / \**/)
		line = substr(line, RSTART + RLENGTH)
		if (words[2] in tags)
			variable[words[3]] = words[2]
	}
	line = $0
	for (last = ""; match(line, /[A-Za-z_][A-Za-z_0-9]*/); last = name) {
		name = substr(line, RSTART, RLENGTH)
		before = RSTART > 1 ? substr(line, RSTART - 1, 1) : ""
		line = substr(line, RSTART + RLENGTH)
		s = section
		if (before == "." || before == ">") {
			tag = last in variable ? variable[last] : last
			if ((tag, name) in member && section != upto[tag, name])
				s = member[tag, name]
		} else if (name in home && home[name] in door &&
		    open[home[name]] == ((home[name], name) in listed))
			s = home[name]
		if (s != section)
			print "proxy.c:" FNR ": " name " belongs to section " s
		else if (before !~ /[.>]/ && name in home && chapter[home[name]] != chapter[s]) {
			of = chapter[home[name]]
			if (of && !((of, name) in outer))
				print "proxy.c:" FNR ": " name \
				    " is not on the door of section " of
			used[of, name]
		}
	} }
	END {
		for (i in outer) {
			split(i, words, SUBSEP)
			if (++names[words[1]] > DOOR_MAX || !(i in used))
				print "proxy.c:0: " words[2] \
				    " is too much on the door of section " words[1]
		}
		print doors + 0
	}' DOOR_MAX=$door_max "$1" doors.code
}

doors_min=28	# sections that have one
door_max=12	# names on the door of a chapter, which is several sections

test_style_doors() { # a section's own functions and members are named in it only
	need_source
	doors "$here/proxy.c" > found
	count=$(tail -n 1 found)
	[ "$count" -ge $doors_min ] || fail "$count sections have a door"
	counts 1 found ''
	# A copy with two sections more, the last of which goes through the wall.
	{
		cat "$here/proxy.c"
		cat <<'END'
/* ---- 98. Doctored ---- */
/*
 * Door of sections 98 to 98: doctored_open,
 * doctored_gone.
 *
 * Door: doctored_open,
 * doctored_shut, doctored_places.
 */
struct doctored {
	int open;
	/* private to section 98 */
	int hidden;
};
doctored_open(void)
doctored_shut(void)
doctored_secret(void)
static int doctored_hidden = 1;
/* ---- 99. End ---- */
	doctored_shut(x->doctored.open, doctored_open()); /* doctored_secret */
	doctored_secret("doctored_secret", x->hidden, x->doctored.hidden);
	struct doctored *y = x;
	y->hidden = y->open + doctored_hidden;
END
	} > doctored.c
	doors doctored.c | sed -n 's/^proxy.c:[0-9]*: //p' > found
	cat > want <<'END'
doctored_places is not in its place on the door
doctored_shut is not on the door of section 98
doctored_secret belongs to section 98
hidden belongs to section 98
hidden belongs to section 98
doctored_hidden belongs to section 98
doctored_gone is too much on the door of section 98
END
	cmp want found || fail "the doctored copy: $(cat found)"
	door_max=11
	doors "$here/proxy.c" > found
	for chapter in 9 13; do
		has found " is too much on the door of section $chapter\$"
	done
}

# The names in a walk of the head comment, or in all walks: walk_names [WALK]
walk_names() {
	# shellcheck disable=SC2031 # a range, not a variable
	sed -n "/^ \* walk ${1-[a-z]*}: /,/\.\$/p" "$here/proxy.c" |
	    sed 's/^ \* walk [a-z]*: //' | tr -c 'a-z_0-9\n' '\n' | grep .
}

# The end of names.c: with $CALLS the functions of the walks write their names to
# the file calls.
write_walked() {
	cat <<'EOF_WALKED'

void __cyg_profile_func_enter(void *, void *)
    __attribute__((no_instrument_function));
void __cyg_profile_func_exit(void *, void *)
    __attribute__((no_instrument_function));

void
__cyg_profile_func_enter(void *function, void *caller)
{
	static const struct {
		void *function;
		const char *name;
	} names[] = {
EOF_WALKED
	walk_names | sort -u | sed 's/.*/{ (void *)&, "&\\n" },/'
	cat <<'EOF_WALKED'
	};
	static int traced = -1;
	size_t i;
	int fd;

	(void)caller;
	if (traced == -1)
		traced = getenv("CALLS") != NULL;
	for (i = 0; traced && i < sizeof(names) / sizeof(names[0]); i++)
		if (names[i].function == function) {
			fd = open("calls", O_WRONLY | O_CREAT | O_APPEND, 0600);
			(void)!write(fd, names[i].name, strlen(names[i].name));
			(void)close(fd);
		}
}

void
__cyg_profile_func_exit(void *function, void *caller)
{
	(void)function;
	(void)caller;
}
EOF_WALKED
}

# The first function of the walk in walk.want that was not called in its turn.
walk_gap() {
	awk 'FNR == NR { want[++n] = $1; next } $1 == want[at + 1] { at++ }
	END { if (at < n || n < 5) print n ? want[at + 1] : "no walk" }' walk.want calls
}

# cc has -finstrument-functions, and its programs run here.
traces() {
	printf '%s\n' 'void __cyg_profile_func_enter(void *, void *)' \
	    '    __attribute__((no_instrument_function));' 'void _exit(int);' \
	    'void __cyg_profile_func_exit(void *f, void *c) { }' \
	    'void __cyg_profile_func_enter(void *f, void *c) { _exit(3); }' \
	    'int main(void) { return 0; }' > "$work/try.c"
	$cc -finstrument-functions -o "$work/try" "$work/try.c" 2> /dev/null
	"$work/try" 2> /dev/null
	[ $? = 3 ] && touch "$work/traces"
}

test_style_walks() { # the walks in the head comment are the ways of real exchanges
	surrounded
	[ -f "$work/traces" ] || skip "cc has no -finstrument-functions"
	export CALLS=calls
	start_cache
	origin o 'replies 200 Connection: close\nCache-Control: max-age=99 | ok'
	for walk in miss hit connect; do
		: > calls
		case $walk in
		connect) printf '%s\n' 'ask CONNECT %O' 'ask /' eof ;;
		*) printf '%s\n' 'ask /' shut eof ;;
		esac | client $walk
		walk_names $walk > walk.want
		wait_for 5 '[ -z "$(walk_gap)" ]' ||
			fail "$walk: $(walk_gap) is not called in its turn"
	done
	logged <<'END'
~ miss=stored
~ hit=fresh
~ CONNECT .* end=
END
	# A walk with two names exchanged is none.
	awk 'NR == 2 { second = $0; next } { print } NR == 3 { print second }' \
	    walk.want > swapped
	mv swapped walk.want
	[ -n "$(walk_gap)" ] || fail "a wrong walk is not found out"
}

test_style_parts() { # the parts of this file have the titles of the sections of proxy.c, none of which has 1000 lines
	need_source
	sed -n 's/^\/\* ---- \([0-9]*\. .*\) ---- \*\/$/\1/p' \
	    "$here/proxy.c" > sections
	sed -n 's/^# ---- \([0-9]*\. .*[^-]\) --*$/\1/p' "$self" |
	    head -n "$(wc -l < sections)" > parts
	[ "$(wc -l < sections)" -gt "$doors_min" ] || fail "no sections"
	diff sections parts || fail "$(diff sections parts | tail -n 1)"
	awk '/^\/\* ---- [0-9]/ { from = FNR }
		FNR - from == 1000 { print FNR }' "$here/proxy.c" > long
	[ ! -s long ] || fail "a section has 1000 lines at line $(cat long)"
	sed -n 's/^\(test_[a-z0-9_]*\)() .*/\1/p' "$self" | sort | uniq -d > twice
	[ ! -s twice ] || fail "two tests are called $(cat twice)"
}

test_style_files() { # the tree is five files, and dot-files
	need_source
	for file in "$here"/*; do
		case ${file##*/} in
		proxy.c | proxy.1 | test.sh | Makefile | README) ;;
		proxy | *.o | core*) ;;		# built here
		*) fail "${file##*/} does not belong here" ;;
		esac
	done
	for file in proxy.c proxy.1 Makefile README; do
		[ -f "$here/$file" ] || fail "no $file"
	done
}

# ---- 31. Real programs ------------------------------------------------------

# Clients, servers and parents that people really use, each doing its work
# through the proxy on loopback (only test_real_apt goes to the machine's
# sources). A program that is not there is a skip.

unset http_proxy https_proxy ftp_proxy all_proxy no_proxy
unset HTTP_PROXY HTTPS_PROXY FTP_PROXY ALL_PROXY NO_PROXY
PATH=$PATH:/usr/sbin:/sbin

# Ports and servers for this section; everything is built and made once a run.
real_ready() {
	if mkdir "$work/real" 2> /dev/null; then
		dd if=/dev/urandom of="$work/real/large" bs=1048576 count=16 \
			2> /dev/null
		awk 'BEGIN { for (i = 0; i < 20000; i++) print "line", i }' \
			> "$work/real/text"
		: > "$work/real/ready"
	fi
	wait_for 60 "[ -f \"$work/real/ready\" ]" || fail "nothing is ready"
}

real_ports() { # sets real_p1 and real_p2 to free ports
	"$peer" nobody 2 > ports || fail "no ports"
	{ read -r real_p1 && read -r real_p2; } < ports
}

# nginx on $web (127.0.0.1 and, where there is one, ::1) and, with a
# certificate of our own making, on $tls. Its log is $T/web.log.
real_web() {
	have nginx || skip "no nginx"
	real_ready
	real_ports
	web=$real_p1 tls=$real_p2 six='' secure='' user=''
	address_here ::1 && six="listen [::1]:$web;"
	[ "$(id -u)" -ne 0 ] || user='user root;'
	mkdir -p web/put
	ln -s "$work/real/large" web/large
	ln -s "$work/real/text" web/text
	have openssl && {
		openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 \
			-nodes -days 2 -subj /CN=localhost -keyout key -out cert \
			-addext subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1 \
			2> openssl.err || fail "openssl: $(tail -n 1 openssl.err)"
		secure="listen 127.0.0.1:$tls ssl;
			ssl_certificate $T/cert; ssl_certificate_key $T/key;"
	}
	cat > nginx.conf <<-EOF
		daemon off; master_process off; $user
		pid $T/nginx.pid; error_log $T/nginx.err;
		events { worker_connections 1000; }
		http {
			log_format seen '\$connection "\$request" \$status'
				' "\$http_host" "\$http_via" "\$http_proxy_connection"';
			access_log $T/web.log seen;
			client_body_temp_path $T/t1; proxy_temp_path $T/t2;
			fastcgi_temp_path $T/t3; uwsgi_temp_path $T/t4;
			scgi_temp_path $T/t5; client_max_body_size 0;
			types { text/html html; text/plain txt; image/bmp bmp; }
			default_type text/plain;
			gzip on; gzip_types text/plain; gzip_proxied any;
			server {
				listen 127.0.0.1:$web; $six $secure
				root $T/web;
				location /put/ { dav_methods PUT DELETE; }
			}
		}
	EOF
	spawn nginx.out nginx -c "$T/nginx.conf"
	wait_for 10 '[ -s nginx.pid ]' ||
		fail "nginx does not start: $(tail -n 1 nginx.err)"
}

# The server of our own on $serve.
real_serve() {
	real_ready
	spawn serve.out "$peer" serve port
	wait_for 5 '[ -s port ]' || fail "the server does not start"
	serve=$(cat port)
}

real_curl() { # curl through the proxy, on its own
	curl -q -sS --max-time 60 -x "http://$proxy" "$@"
}

# What curl gets with these arguments is what is in the file WANT.
real_get() { # WANT ARGUMENT...
	real_want=$1
	shift
	real_curl -o out "$@" || fail "curl $*"
	real_same out "$real_want"
	rm out
}

# The log gets a line for this request, and behind it what REST matches (both
# extended regular expressions).
real_log() { # METHOD URL REST
	log_from=1
	logged <<END
~ "$1 $2 HTTP/1\.[01]" $3
END
}

real_has() { # FILE ERE: a line in the file matches
	grep -E -i -e "$2" "$1" > /dev/null || fail "no $2 in $1: $(head -c 500 "$1")"
}

# curl sends FILE to URL, where it is kept as COPY.
real_put() { # FILE COPY URL [CURL-ARGUMENT...]
	real_file=$1 real_copy=$2
	shift 2
	# shellcheck disable=SC2094 # it is read twice
	real_curl -o out -T "$real_file" "$@" < "$real_file" || fail "curl -T $*"
	real_same "$real_copy" "$real_file"
}

real_same() { # A B: the files are alike
	cmp "$1" "$2" > cmp.out 2>&1 || fail "not the same: $(head -n 1 cmp.out)"
}

test_real_curl() { # curl: plain, large, by name, ranges, resumed
	have curl || skip "no curl"
	real_web
	start_proxy
	real_get web/text -D head "http://127.0.0.1:$web/text"
	real_has head '^HTTP/1.1 200 '
	real_has head '^Via: 1.1 proxy-[0-9a-f]{8}'
	real_log GET "http://127.0.0.1:$web/text" "200 208890 \"-\" \"curl/[^ ]*\" \
up=0 dns=- connect=N first=N total=N server=127.0.0.1:$web end=done\$"
	real_has web.log " \"127.0.0.1:$web\" \"1.1 proxy-[0-9a-f]*\" \"-\"\$"
	real_get web/large "http://127.0.0.1:$web/large"
	real_log GET ".*/large" "200 16777216 .* end=done"
	real_get web/text "http://localhost:$web/text"
	real_log GET "http://localhost:$web/text" \
		"200 .* dns=N .* server=(127.0.0.1|\[::1\]):$web end=done"
	dd if=web/large of=want bs=1000 skip=1 count=1 2> /dev/null
	real_get want -r 1000-1999 "http://127.0.0.1:$web/large"
	real_log GET ".*/large" "206 1000 "
	dd if=web/large of=out bs=1000000 count=12 2> /dev/null
	real_get web/large -C - "http://127.0.0.1:$web/large"
	real_curl -f -o out "http://127.0.0.1:$web/nothing" 2> err404
	[ $? -eq 22 ] || fail "curl -f on a 404: $(cat err404)"
	real_log GET ".*/nothing" "404 "
	real_curl -I -o head "http://127.0.0.1:$web/large" || fail "curl -I"
	real_has head '^Content-Length: 16777216'
	real_log HEAD ".*/large" "200 0 "
}

test_real_curl_uploads() { # curl: POST and PUT, by length and chunked
	have curl || skip "no curl"
	real_web
	real_serve
	start_proxy
	for file in text=208890 large=16777216; do
		: > body
		real_curl -o out --data-binary @"$work/real/${file%=*}" \
			"http://127.0.0.1:$serve/" || fail "curl, POST"
		real_same body "$work/real/${file%=*}"
		real_has out "POST ${file#*=} bytes"
		real_log POST "http://127.0.0.1:$serve/" "200 .* up=${file#*=} .* end=done"
	done
	: > body
	real_curl -o out -T - "http://127.0.0.1:$serve/x" < "$work/real/large" ||
		fail "curl, chunked PUT"
	real_same body "$work/real/large"
	real_has out 'PUT 16777216 bytes'
	real_put "$work/real/text" web/put/a "http://127.0.0.1:$web/put/a"
	real_log PUT "http://127.0.0.1:$web/put/a" "201 .* up=208890 "
	real_curl -o out -T - "http://127.0.0.1:$web/put/b" < "$work/real/text" ||
		fail "curl, chunked PUT to nginx"
	real_same web/put/b "$work/real/text"
	real_curl -o out -X DELETE "http://127.0.0.1:$web/put/b" || fail "DELETE"
	[ ! -e web/put/b ] || fail "DELETE left the file"
}

test_real_curl_old() { # curl: HTTP/1.0, IPv6, gzip, chunks to an old client
	have curl || skip "no curl"
	real_web
	start_proxy
	real_get web/text -0 -D head "http://127.0.0.1:$web/text"
	real_log GET ".*/text" "200 .* end=done"
	real_has log 'HTTP/1.0" 200'
	real_get web/text --compressed -D head "http://127.0.0.1:$web/text"
	real_has head '^Content-Encoding: gzip'
	real_has head '^Transfer-Encoding: chunked'
	real_get web/text -0 --compressed -D head "http://127.0.0.1:$web/text"
	grep -qi '^Transfer-Encoding' head && fail "chunks to HTTP/1.0: $(cat head)"
	real_has head '^Content-Encoding: gzip'
	[ -n "$six" ] || skip "no IPv6 here; the rest passed"
	real_get web/text "http://[::1]:$web/text"
	real_log GET "http://\[::1\]:$web/text" "200 .* server=\[::1\]:$web "
}

# N requests at once, PARALLEL of them, for the text at URL:
real_parallel() { # N PARALLEL URL [CURL-ARGUMENT...]
	real_n=$1 real_parallel=$2 real_url=$3
	shift 3
	mkdir -p many
	real_curl --parallel --parallel-immediate --parallel-max "$real_parallel" \
		-o 'many/#1' "$real_url?[1-$real_n]" "$@" 2> curl.err ||
		fail "curl --parallel: $(grep curl: curl.err | head -1)"
	real_all "$real_n"
}

# All N files of many are the text.
real_all() {
	cksum many/* | awk -v sum="$(cksum < web/text)" -v n="$1" '
		$1 " " $2 == sum { same++ }
		END { exit NR != n || same != n }' || fail "not $1 right answers"
	rm many/*
}

test_real_curl_many() { # curl: 200 requests on one connection, 200 at once
	have curl || skip "no curl"
	real_web
	start_proxy
	mkdir many
	real_curl -o 'many/#1' -w '%{num_connects}\n' \
		"http://127.0.0.1:$web/text?[1-200]" > connects || fail "curl"
	[ "$(awk '{ n += $1 } END { print n }' connects)" -eq 1 ] ||
		fail "curl had to connect anew"
	[ "$(awk '{ print $1 }' web.log | sort -u | grep -c .)" -eq 1 ] ||
		fail "the server's connection was not kept"
	real_all 200
	real_parallel 200 100 "http://127.0.0.1:$web/text"
	wait_for 5 "[ \$(grep -c end=done log) -eq 400 ]" ||
		fail "$(grep -c end=done log) log lines of 400"
}

test_real_curl_https() { # curl: CONNECT to TLS, one and many at once
	have curl || skip "no curl"
	have openssl || skip "no openssl"
	real_web
	start_proxy
	real_get web/large --cacert cert "https://127.0.0.1:$tls/large"
	real_log CONNECT "127.0.0.1:$tls" "200 1[67][0-9]{6} .* up=[1-9][0-9]* .* \
server=127.0.0.1:$tls end=(client|server)\$"
	real_get web/text --cacert cert "https://localhost:$tls/text"
	real_put "$work/real/text" web/put/c "https://127.0.0.1:$tls/put/c" \
		--cacert cert
	real_parallel 100 50 "https://127.0.0.1:$tls/text" --cacert cert --http1.1
	real_get web/text -p "http://127.0.0.1:$web/text"
	real_log CONNECT "127.0.0.1:$web" "200 "
}

test_real_wget() { # wget: plain, large, resumed, a small site, https
	wget --version 2> /dev/null | grep -q 'GNU Wget' || skip "no GNU wget"
	real_web
	start_proxy
	cat > web/index.html <<-'EOF'
		<a href="a.html">a</a> <a href="/text">text</a>
	EOF
	echo '<a href="deep/b.html">b</a>' > web/a.html
	mkdir web/deep
	echo 'the end' > web/deep/b.html
	WGETRC=$T/wgetrc
	export WGETRC
	printf 'http_proxy = http://%s/\nhttps_proxy = http://%s/\n' \
		"$proxy" "$proxy" > wgetrc
	wget -q -T 30 -t 1 -O out "http://127.0.0.1:$web/large" || fail "wget"
	real_same out web/large
	real_log GET ".*/large" "200 16777216 \"-\" \"Wget/[^\"]*\" .* end=done"
	dd if=web/large of=large bs=1000000 count=10 2> /dev/null
	wget -q -T 30 -t 1 -c "http://127.0.0.1:$web/large" || fail "wget -c"
	real_same large web/large
	real_log GET ".*/large" "206 6777216 "
	wget -q -T 30 -t 1 -r -nH -P site "http://127.0.0.1:$web/" ||
		[ $? -eq 8 ] || fail "wget -r"
	real_same site/deep/b.html web/deep/b.html
	real_same site/text web/text
	have openssl || skip "no openssl; the rest passed"
	wget -q -T 30 -t 1 --ca-certificate=cert -O out \
		"https://127.0.0.1:$tls/text" || fail "wget, https"
	real_same out web/text
	real_log CONNECT "127.0.0.1:$tls" "200 "
}

real_apt() { # apt-get with state and cache of its own
	timeout 300 apt-get -qq -o Dir::State="$T/state" -o Dir::Cache="$T/cache" \
		-o Dir::State::status=/var/lib/dpkg/status -o Dir::Log="$T" \
		-o APT::Sandbox::User="$(id -un)" -o Acquire::Retries=2 "$@"
}

test_real_apt() { # apt-get: update and download, from the machine's sources
	have apt-get || skip "no apt-get"
	have timeout || skip "no timeout"
	[ -r /var/lib/dpkg/status ] || skip "no list of packages"
	start_proxy
	mkdir -p state/lists/partial cache/archives/partial deb
	set -- -o Acquire::http::Proxy="http://$proxy" \
		-o Acquire::https::Proxy="http://$proxy"
	real_apt "$@" update > apt.out 2>&1
	if grep -q '^[EW]: ' apt.out; then
		real_apt update > direct.out 2>&1
		grep -q '^[EW]: ' direct.out &&
			skip "apt-get update fails without the proxy too"
		fail "apt-get update: $(grep '^[EW]:' apt.out | head -1)"
	fi
	real_log '(GET|CONNECT)' '[^ ]*(/InRelease|:443)' '200 '
	(cd deb && real_apt "$@" download hostname) > apt.out 2>&1 || {
		(cd deb && real_apt download hostname) > direct.out 2>&1 ||
			skip "apt-get download fails without the proxy too"
		fail "apt-get download: $(grep '^[EW]:' apt.out | head -1)"
	}
	dpkg-deb --field deb/hostname_*.deb Package > name 2>&1
	grep -qx hostname name || fail "no package: $(head -n 1 name)"
	real_log '(GET|CONNECT)' '[^ ]*(/hostname_[^ ]*.deb|:443)' '200 '
	grep -E '" [45][0-9][0-9] .* why=' log | grep -v '" 404 ' > bad &&
		fail "refused: $(head -n 1 bad)"
}

# A repository in web/ with one package, old enough to be fresh for a while by
# its Last-Modified alone.
real_repository() {
	mkdir -p tree/DEBIAN
	cp "$work/real/text" tree/text
	printf '%s\n' 'Package: proxied' 'Version: 1' 'Architecture: all' \
		'Maintainer: nobody <nobody@localhost>' 'Description: nothing' \
		> tree/DEBIAN/control
	chmod 755 tree tree/DEBIAN
	dpkg-deb --build tree web/proxied.deb > deb.out 2>&1 ||
		fail "dpkg-deb: $(tail -n 1 deb.out)"
	touch -t 202001010000 web/proxied.deb
	{
		cat tree/DEBIAN/control
		echo "Filename: ./proxied.deb"
		echo "Size: $(wc -c < web/proxied.deb)"
		echo "SHA256: $(sha256sum < web/proxied.deb | cut -d ' ' -f 1)"
	} > web/Packages
	printf 'Date: %s\nSHA256:\n %s %s Packages\n' \
		"$(date -u '+%a, %d %b %Y %H:%M:%S UTC')" \
		"$(sha256sum < web/Packages | cut -d ' ' -f 1)" \
		"$(wc -c < web/Packages)" > web/Release
	echo "deb [trusted=yes] http://127.0.0.1:$web/ ./" > sources
}

# A machine of its own, in the directory HOME, gets the package.
real_apt_home() { # HOME OPTION...
	mkdir -p "$1/state/lists/partial" "$1/cache/archives/partial"
	cd "$1" || fail "no $1"
	shift
	set -- -o Dir::State="$PWD/state" -o Dir::Cache="$PWD/cache" "$@"
	for command in update 'download proxied'; do
		# shellcheck disable=SC2086 # words
		real_apt "$@" $command > apt.out 2>&1 ||
			fail "apt-get $command: $(grep '^[EW]:' apt.out | head -1)"
		grep -q '^[EW]:' apt.out && fail "$command: $(cat apt.out)"
	done
	cd "$T" || fail "no $T"
}

# How nginx answered for a file: the statuses, each with a blank behind it.
real_seen() { # FILE STATUSES
	real_statuses=$(sed -n "s|.*/$1 HTTP/1.1\" \([0-9]*\) .*|\1|p" web.log |
	    tr '\n' ' ')
	[ "$real_statuses" = "$2" ] || fail "nginx had for $1: $real_statuses"
}

test_real_apt_cache() { # apt-get on two machines: the cache has it for the second
	have apt-get || skip "no apt-get"
	have dpkg-deb || skip "no dpkg-deb"
	real_web
	real_repository
	start_proxy -c store
	for dir in one two; do
		real_apt_home "$dir" -o Acquire::http::Proxy="http://$proxy" \
			-o Dir::State::status=/dev/null \
			-o Dir::Etc::SourceList="$T/sources" \
			-o Dir::Etc::SourceParts=/dev/null
		real_same "$dir/proxied_1_all.deb" web/proxied.deb
	done
	# Of lists apt wants to know that they are current, of packages not.
	for file in Release Packages; do
		real_log GET "[^ ]*/$file" '200 .* miss=stored '
		real_log GET "[^ ]*/$file" '200 .* hit=validated '
		real_seen "$file" '200 304 '
	done
	real_log GET '[^ ]*/proxied.deb' '200 .* miss=stored '
	real_log GET '[^ ]*/proxied.deb' '200 .* hit=fresh .* server=- '
	real_seen proxied.deb '200 '
}

real_git() {
	env HOME="$T" GIT_CONFIG_NOSYSTEM=1 GIT_TERMINAL_PROMPT=0 \
		git -c http.proxy="http://$proxy" -c user.name=a -c user.email=a@b \
		-c init.defaultBranch=main -c advice.detachedHead=false "$@"
}

test_real_git() { # git: clone from plain files, clone, fetch and push by CGI
	have git || skip "no git"
	real_web
	real_serve
	start_proxy
	mkdir git
	real_git init -q tree
	cp "$work/real/text" tree/text
	dd if="$work/real/large" of=tree/bytes bs=1000000 count=1 2> /dev/null
	real_git -C tree add .
	real_git -C tree commit -q -m one
	real_git clone -q --bare tree git/repo.git || fail "no repository"
	real_git -C git/repo.git update-server-info
	real_git -C git/repo.git config http.receivepack true
	ln -s "$T/git/repo.git" web/repo.git
	real_git clone -q "http://127.0.0.1:$web/repo.git" dumb > git.out 2>&1 ||
		fail "clone of files: $(tail -n 1 git.out)"
	real_same dumb/text "$work/real/text"
	real_same dumb/bytes tree/bytes
	real_log GET "http://127.0.0.1:$web/repo.git/objects/[^ ]*" "200 "
	[ -x "$(git --exec-path)/git-http-backend" ] ||
		skip "no git http-backend; the rest passed"
	real_git clone -q "http://127.0.0.1:$serve/git/repo.git" smart \
		> git.out 2>&1 || fail "clone: $(tail -n 1 git.out)"
	real_same smart/bytes tree/bytes
	real_log POST ".*/git/repo.git/git-upload-pack" "200 1[0-9]{6} "
	dd if="$work/real/large" of=smart/more bs=1000000 skip=4 count=1 2> /dev/null
	real_git -C smart add .
	real_git -C smart commit -q -m two || fail "no commit"
	real_git -C smart -c http.postBuffer=65536 push -q origin HEAD \
		> git.out 2>&1 || fail "push: $(tail -n 1 git.out)"
	real_log POST ".*/git/repo.git/git-receive-pack" "200 .* up=1[0-9]{6} "
	real_git -C dumb pull -q "http://127.0.0.1:$serve/git/repo.git" main \
		> git.out 2>&1 || fail "pull: $(tail -n 1 git.out)"
	real_same dumb/more smart/more
}

# The browser, with all that it would ask of the world turned away.
real_browser() {
	timeout 120 "$browser" --headless --no-sandbox --disable-gpu --disable-quic \
		--no-first-run --disable-background-networking \
		--disable-component-update --disable-sync \
		--user-data-dir="$T/profile" --proxy-server="http://$proxy" \
		--proxy-bypass-list="<-loopback>;$proxy;*.google.com;*.googleapis.com" \
		--host-resolver-rules='MAP * ~NOTFOUND, EXCLUDE 127.0.0.1' \
		--ignore-certificate-errors --disable-web-security --dump-dom "$@" \
		2> browser.err
}

test_real_browser() { # chromium: a page, a picture, a script, a WebSocket, whose row on the status page comes and goes; in it a page and its picture over CONNECT
	for browser in chromium chromium-browser google-chrome; do
		have "$browser" && break
	done
	have "$browser" || skip "no chromium"
	have timeout || skip "no timeout"
	have openssl || skip "no openssl"
	real_web
	real_serve
	start_proxy
	# A picture of 300 by 200.
	{
		printf 'BM\0\0\0\0\0\0\0\0\066\0\0\0\050\0\0\0\054\001\0\0\310\0\0\0'
		printf '\001\0\030\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0'
		dd if=/dev/zero bs=900 count=200 2> /dev/null
	} > web/picture.bmp
	echo "<img src=picture.bmp onload=\"parent.postMessage(this.naturalWidth, '*')\">" \
	    > web/inner.html
	# The page says what came of it.  The last script is kept back until a
	# second WebSocket has said that all else is there.  The status page loads
	# itself anew all two seconds.
	cat > web/page.html <<-EOF
		<!doctype html><title>page</title><img id=i src=picture.bmp><p id=o>
		<script>
		var text = '', inner = '', row = '', late = '';
		var s = new WebSocket('ws://127.0.0.1:$serve/ws');
		s.onopen = function () { s.send('x'.repeat(70000)); };
		s.onmessage = function (e) { text = e.data.length; };
		onmessage = function (e) { inner = e.data; };
		function look(status) {
			var page = status.contentDocument.body.textContent;
			var here = /#[0-9]+ relay, waits for [^#]* CONNECT 127.0.0.1:$serve/.test(page);
			var ended = /#[0-9]+ (client|server) [^#]* CONNECT 127.0.0.1:$serve/.test(page);
			if (row === '' && here && text !== '' && inner !== '') {
				row = 'came';
				s.close();
			} else if (row === 'came' && !here && ended) {
				row = 'gone';
				s = new WebSocket('ws://127.0.0.1:$serve/ws');
				s.onopen = function () { s.send('done'); };
			}
		}
		onload = function () {
			var w = document.getElementById('i').naturalWidth;
			document.getElementById('o').textContent = 'picture=' + w +
			    ' text=' + text + ' inner=' + inner + ' row=' + row +
			    ' late=' + late + ';';
		};
		</script>
		<iframe src=https://127.0.0.1:$tls/inner.html></iframe>
		<iframe src=http://$proxy/status onload="look(this)"></iframe>
		<script src=http://127.0.0.1:$serve/wait></script>
	EOF
	real_browser "http://127.0.0.1:$web/page.html" > dom ||
		fail "chromium: $(tail -n 1 browser.err)"
	grep -q 'picture=300 text=70000 inner=300 row=gone late=came;' dom ||
		fail "the page says: $(grep 'id="o"' dom | head -1)"
	real_log GET "http://127.0.0.1:$web/page.html" "200 .*Chrome.* end=done"
	real_log GET "http://127.0.0.1:$web/picture.bmp" "200 180054 "
	real_log CONNECT "127.0.0.1:$serve" \
		"200 7[0-9]{4} .* up=7[0-9]{4} .* end=(client|server|reset)\$"
	real_log CONNECT "127.0.0.1:$tls" "200 1[0-9]{5} .* end="
}

# The commands of lesson N of the manual, with free ports in the place of its own.
lesson() {
	awk -v n="$1" '/^[.]Ss / { here = $2 == n "." }
	here && /^[.]Ed/ { exit }
	here && shown
	here && /^[.]Bd/ { shown = 1 }' "$here/proxy.1" |
	    sed -e 's/\\e/\\/g' -e 's/^[$] //' -e "s/808[12]/$lesson_port/g"
}

# Lesson N, and what is to be seen of it: learns N ERE...
learns() {
	learns_n=$1
	shift
	# On a slow machine the lesson's nc may not listen yet: then once more.
	for learns_try in 1 2 3; do
		nobody
		lesson_port=$origin_port
		lesson "$learns_n" > "lesson.$learns_n"
		PATH=$T/bin:$PATH sh "lesson.$learns_n" > "said.$learns_n" 2>&1
		grep 'Connection refused' "said.$learns_n" > /dev/null || break
		"$peer" client "127.0.0.1:$lesson_port" "late$learns_try" < /dev/null
	done
	for learns_ere; do
		grep -a -E -e "$learns_ere" "said.$learns_n" > /dev/null ||
			fail "lesson $learns_n: no $learns_ere in:" \
			    "$(head -c 3000 "said.$learns_n" | tr '\n' '|')"
	done
}

test_real_lessons() { # curl and nc: the LESSONS of the manual show what they say
	have curl || skip "no curl"
	nc -h 2>&1 | grep -e '-X proxy' > /dev/null || skip "no nc of OpenBSD"
	mkdir bin
	ln -s "$proxy_bin" bin/proxy
	learns 1 '>s - Connection: X-A' '>s - X-A: 1 .*7.6.1' '>s [+] Via: ' hello
	learns 2 '>s [+] If-None-Match: "a"' 's> HTTP/1.1 304' hit=validated
	counts 2 said.2 '^>c HTTP/1.1 200\|>c HTTP/1.1 200'
	learns 3 '^Age: [2-9]' '^Cache-Status: .*ttl=-' hit=stale 'hello.*hello|^hello'
	learns 4 '>c - Transfer-Encoding: chunked' '>c [+] Connection: close' '(^|[^0-9])hello'
	learns 5 'the client sends no more' hello 'the server sends no more'
	learns 6 'trying (127.0.0.1|\[::1\]):' connected hello
	learns 7 miss=stored hit=collapsed
	[ "$(grep -c '" 200 5 .*server=.*end=done' said.7)" -ge 2 ] ||
		fail "$(cat said.7)"
	learns 8 '^HTTP/1.1 400 ' '" 400 .* why="' 'Content-Length and'
	has said.8 'response -> linger\|-> linger'
	lacks said.8 admin.*HTTP/1.1.*200
}

test_real_record() { # jq and har-validator: what -w writes is HAR 1.2, before and after a kill
	have jq || skip "no jq"
	start_proxy -c cache -w s.har
	play 'of each kind' <<'END'
	reply  200 Cache-Control: max-age=99\nETag: "a" | caf\xc3\xa9 "\\"
	ask    /a?b=c&d= Cookie: a=b = 200
	ask    /a?b=c&d= = 200
	ask    /a?b=c&d= If-None-Match: "a" = 304
	ask    HEAD /a?b=c&d= = 200
	origin next
	reply  302 Location: /b | \xe9\x00
	ask    POST /p Content-Type: text/plain | \xff = 302
	ask    here /status = 200
	ask    CONNECT 127.0.0.1:9 = 502
	== none
	client send no request\n\n ; eof
END
	# An entry may be written after its client has the response.
	wait_for 5 '[ "$(wc -l < s.har)" = 12 ]' ||
		fail "$(wc -l < s.har) lines, not those of 10 entries"
	kill -KILL "$proxy_pid"
	wait "$proxy_pid" 2> /dev/null
	: > .proxies
	[ "$(jq -r '.log.entries[].response.status' s.har | tr '\n' ' ')" = \
	    '200 200 304 200 302 200 502 200 400 200 ' ] || fail "jq: $(jq -c . s.har)"
	jq -r '.log.entries[0].response.content.text' s.har > text
	printf 'caf\303\251 "\\"\n' | cmp - text || fail "text: $(cat text)"
	[ "$(jq -r '.log.entries[4] | .request.postData.text,
	    .response.content.text' s.har | tr '\n' ' ')" = '/w== 6QA= ' ] ||
		fail "bytes: $(jq -c '.log.entries[4]' s.har)"
	jq -e '[.log.entries[] | .time - ([.timings[] | select(. > 0)] | add // 0)
	    | select(. > 1 or . < -1)] | length == 0' s.har > sums ||
		fail "the times are not the sum: $(jq -c '.log.entries[]' s.har)"
	have node && [ -d /usr/share/nodejs/har-validator ] ||
		skip "no har-validator; jq is content"
	NODE_PATH=/usr/share/nodejs node -e '
	const har = JSON.parse(require("fs").readFileSync("s.har"));
	require("har-validator").har(har).then(
	    () => console.log("valid", har.log.entries.length),
	    e => console.log(JSON.stringify(e.errors)))' > says 2>&1
	grep -x 'valid 10' says > /dev/null || fail "$(head -c 500 says)"
}

test_real_upgrade() { # a WebSocket by Upgrade: 101 turns into a tunnel
	have openssl || skip "no openssl"
	real_serve
	origin=127.0.0.1:$serve
	play -n '100000 bytes are echoed, then both close' <<'END'
	client send GET http://%O/ws HTTP/1.1\nHost: %O\nUpgrade: websocket\nConnection: Upgrade\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\n\n
	client until \n\n
	client send \x81\xff\0\0\0\0\0\x01\x86\xa0\0\0\0\0\{100000:@} ; want 100010
	client send \x88\x80\0\0\0\0 ; want 2
	sees   HTTP/1.1 101 Switching Protocols
	sees   Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=
	log    "GET http://%O/ws HTTP/1.1" 101 1000[0-9][0-9] .* up=1000[0-9][0-9] .* end=
END
	[ "$(tail -c 100002 c1 | tr -cd @ | wc -c)" -eq 100000 ] || fail "no echo"
}

# What every parent must do: plain, a large file, an upload, and a tunnel.
real_through_parent() { # PORT: of the parent
	for u in text large; do
		real_get "web/$u" "http://127.0.0.1:$web/$u"
		real_log GET ".*/$u" "200 .* server=127.0.0.1:$1 end=done"
	done
	real_put "$work/real/text" web/put/a "http://127.0.0.1:$web/put/a"
	[ -s cert ] || skip "no openssl; the rest passed"
	real_get web/large --cacert cert "https://127.0.0.1:$tls/large"
	real_log CONNECT "127.0.0.1:$tls" "200 .* server=127.0.0.1:$1 end="
}

# A tinyproxy on $parent; its arguments are more lines of its configuration.
real_tinyproxy() {
	have tinyproxy || skip "no tinyproxy"
	real_ports
	parent=$real_p1
	printf '%s\n' "Port $parent" 'Listen 127.0.0.1' 'Timeout 60' \
		'MaxClients 100' 'LogLevel Connect' "$@" > tinyproxy.conf
	spawn tinyproxy.out tinyproxy -d -c tinyproxy.conf
	wait_for 5 "curl -q -s -o out http://127.0.0.1:$parent/" ||
		fail "tinyproxy does not start: $(tail -n 1 tinyproxy.out)"
}

test_real_parent_tinyproxy() { # -x http: tinyproxy as the parent
	have curl || skip "no curl"
	real_web
	real_tinyproxy
	start_proxy -x "http://127.0.0.1:$parent"
	real_through_parent "$parent"
	grep -q "GET http://127.0.0.1:$web/text HTTP/1" tinyproxy.out ||
		fail "tinyproxy saw no GET"
	grep -q "CONNECT 127.0.0.1:$tls HTTP/1" tinyproxy.out ||
		fail "tinyproxy saw no CONNECT"
}

test_real_parent_password() { # -x http: tinyproxy that asks for a password
	have curl || skip "no curl"
	real_web
	real_tinyproxy 'BasicAuth alice secret'
	start_proxy -x "http://alice:secret@127.0.0.1:$parent"
	real_through_parent "$parent"
	grep -q secret log err && fail "the password was printed"
	stop_proxy
	start_proxy -x "http://alice:wrong@127.0.0.1:$parent"
	code=$(real_curl -o out -w '%{http_code}' "http://127.0.0.1:$web/text")
	case $code in
	401 | 407 | 502) ;; # tinyproxy says 401
	*) fail "a wrong password gets $code" ;;
	esac
	real_curl -p -o out "http://127.0.0.1:$web/text" 2> curl.err &&
		fail "a tunnel in spite of a wrong password"
	real_log CONNECT "127.0.0.1:$web" "(401|407|502) "
}

test_real_parent_squid() { # -x http: squid as the parent
	have curl || skip "no curl"
	have squid || skip "no squid"
	real_web
	real_ports
	real_squid "$real_p1" ''
	start_proxy -x "http://127.0.0.1:$real_p1"
	real_through_parent "$real_p1"
}

# Starts a squid on port $1, in the foreground; $2 is more of its
# configuration. It stores nothing unless $3 says so. It has a name of its own
# because squids of one name share memory, and fail if they are of two users.
real_squid_spawn() {
	cat > squid.conf <<-EOF
		http_port 127.0.0.1:$1
		http_access allow all
		${3-cache deny all}
		cache_mem 8 MB
		access_log none
		cache_log /dev/stderr
		cache_store_log none
		pid_filename none
		netdb_filename none
		coredump_dir none
		pinger_enable off
		shutdown_lifetime 0 seconds
		$2
	EOF
	[ -z "${3-}" ] ||
		squid -n "test$1" -N -z -f "$T/squid.conf" > squid.made 2>&1
	spawn squid.out squid -n "test$1" -N -f "$T/squid.conf"
}

real_squid() { # the same, and waits until it serves
	real_squid_spawn "$@"
	wait_for 20 "curl -q -s -o out http://127.0.0.1:$1/" ||
		fail "squid does not start: $(tail -n 1 squid.out)"
}

test_real_parent_socks() { # -x socks5: microsocks, without and with a password
	have curl || skip "no curl"
	have microsocks || skip "no microsocks"
	real_web
	real_ports
	spawn socks1.out microsocks -i 127.0.0.1 -p "$real_p1"
	spawn socks2.out microsocks -i 127.0.0.1 -p "$real_p2" -u alice -P secret
	for i in "127.0.0.1:$real_p1" "alice:secret@127.0.0.1:$real_p2"; do
		wait_for 5 "curl -q -s -o out -x socks5://$i \
			http://127.0.0.1:$web/text" || fail "no microsocks on $i"
	done
	start_proxy -x "socks5://127.0.0.1:$real_p1"
	real_through_parent "$real_p1"
	real_get web/text "http://localhost:$web/text"
	stop_proxy
	start_proxy -x "socks5://alice:secret@127.0.0.1:$real_p2"
	real_through_parent "$real_p2"
	grep -q secret log err && fail "the password was printed"
	stop_proxy
	start_proxy -x "socks5://alice:wrong@127.0.0.1:$real_p2"
	code=$(real_curl -o out -w '%{http_code}' "http://127.0.0.1:$web/text")
	[ "$code" -eq 502 ] || fail "a wrong password gets $code"
	real_log GET "http://127.0.0.1:$web/text" \
		"502 .* server=127.0.0.1:$real_p2 .*why=\""
}

test_real_chain() { # squid as the client: chained to us as its parent
	have curl || skip "no curl"
	have squid || skip "no squid"
	real_web
	start_proxy
	real_ports
	real_squid "$real_p1" "never_direct allow all
		cache_peer 127.0.0.1 parent ${proxy##*:} 0 no-query no-digest default"
	curl -q -sS --max-time 60 -x "http://127.0.0.1:$real_p1" -o out \
		"http://127.0.0.1:$web/large" || fail "curl"
	real_same out web/large
	real_log GET "http://127.0.0.1:$web/large" "200 16777216 .* end=done"
	[ -s cert ] || skip "no openssl; the rest passed"
	curl -q -sS --max-time 60 -x "http://127.0.0.1:$real_p1" -o out \
		--cacert cert "https://127.0.0.1:$tls/text" || fail "curl, https"
	real_same out web/text
	real_log CONNECT "127.0.0.1:$tls" "200 "
}

# An example of the manual, the one that begins with this comment line:
# real_example WORDS
real_example() {
	[ -f "$here/proxy.1" ] || skip "no proxy.1 beside test.sh"
	sed -n "/^# $1\$/,/^\.Ed/p" "$here/proxy.1" | sed '$d'
}

# A client from this address asks the program on port $real_p1 for objects, in
# the background: real_asks ADDRESS FIRST LAST [FILE, touched after the 25th]
real_asks() {
	awk -v at="$2" -v last="$3" -v file="${4-}" 'BEGIN {
		for (n = 1; at <= last; at++) {
			print "ask http://%O/" at
			if (n++ == 25 && file != "")
				print "touch " file
		} }' > "$1.steps"
	PEER_FROM=$1 client_bg "c.$1.$2" "127.0.0.1:$real_p1" < "$1.steps"
}

# Each of those clients has got all its objects: real_answered ADDRESS FIRST LAST
real_answered() {
	wait_for 15 "[ -f c.$1.$2.end ]" || fail "$1 waits for ever"
	counts $(($3 - $2 + 1)) "c.$1.$2" '^HTTP/1.1 200'
	counts $(($3 - $2 + 1)) "c.$1.$2" '^ok$'
}

# URLs that the proxies of these names were asked for by clients whose address
# matches the BRE, each with the proxy: real_asked ADDRESS NAME...
real_asked() {
	real_from=$1
	shift
	for real_name; do
		sed -n "s|^$real_from - .*\"GET \(http://[^ ]*\) .*|\1 $real_name|p" \
		    "$real_name.log"
	done
}

# A proxy behind haproxy: real_behind NAME [PORT]
real_behind() {
	name=$1 start_proxy -l "proxy:127.0.0.1:${2-0}" -c "$T/cache.$1" \
	    -e 'trust client 127.0.0.1' -e 'allow client 127.0.0.1 page metrics' \
	    -e 'allow client 127.0.0.0/24' -e deny
}

# Starts proxies a, b and c, and haproxy before them as the manual has it, on
# port $real_p1.  Sets b to the port of b, and b_pid.
real_haproxy() {
	real_example haproxy.cfg > example.cfg
	for name in a b c; do
		real_behind "$name"
		sed "s/^\(.server $name \).*/\1$proxy/" example.cfg > haproxy.cfg
		mv haproxy.cfg example.cfg
		[ "$name" != b ] || b=${proxy##*:} b_pid=$proxy_pid
	done
	real_ready
	real_ports
	sed "s/^\(.bind \).*/\1127.0.0.1:$real_p1/" example.cfg > haproxy.cfg
	spawn haproxy.out haproxy -db -f haproxy.cfg
	wait_for 10 '"$peer" client "127.0.0.1:$real_p1" up < /dev/null
		[ "$(cat up.end)" = open ]' ||
		fail "haproxy does not start: $(tail -n 1 haproxy.out)"
	for name in a b c; do
		has $name.log '^127.0.0.1 - .*"GET /metrics HTTP/1.1" 200' 10
	done
}

# Ends the proxy b at once.
real_kill_b() {
	kill -KILL "$b_pid"
	grep -v "^$b_pid\$" .proxies > .proxies~
	mv .proxies~ .proxies
}

test_real_haproxy_balance() { # haproxy as the manual has it: PROXY headers, each URL to one proxy, one of three killed
	have haproxy || skip "no haproxy"
	need_second_loopback
	origin o 'replies 200 Cache-Control: max-age=99 | ok\l'
	real_haproxy
	# Two clients ask for the same: each URL has its proxy, which has it then.
	real_asks 127.0.0.11 1 125
	real_asks 127.0.0.12 1 125
	real_answered 127.0.0.11 1 125
	real_answered 127.0.0.12 1 125
	real_asked '127.0.0.1[12]' a b c > asked
	[ "$(wc -l < asked)" = 250 ] && [ "$(sort -u asked | wc -l)" = 125 ] ||
		fail "$(sort -u asked | wc -l) ways for 125 URLs"
	[ "$(grep -c ' hit=' a.log)" -gt 0 ] || fail "a has stored nothing"
	# One proxy is killed; what goes there goes to the others.
	real_asks 127.0.0.13 126 250 going
	real_asks 127.0.0.14 251 375
	comes going
	real_kill_b
	real_answered 127.0.0.13 126 250
	real_answered 127.0.0.14 251 375
	has haproxy.out 'proxies/b is DOWN' 10
	real_asked '127.0.0.1[34]' a b c > asked
	# But for the line of an answer that each client had when it was killed.
	[ "$(sort -u asked | wc -l)" -ge 248 ] || fail "$(wc -l < asked) in the logs"
	# It comes back, to its own URLs.
	real_behind b "$b"
	has haproxy.out 'proxies/b is UP' 10
	before=$(real_asked 127.0.0.14 b | wc -l)
	real_asks 127.0.0.14 376 500
	real_answered 127.0.0.14 376 500
	[ "$(real_asked 127.0.0.14 b | wc -l)" -gt "$before" ] ||
		fail "b is not asked again"
	for name in a b c; do
		real_asked '127.0.0.1[1-4]' $name | grep . > /dev/null ||
			fail "$name was not asked"
		counts 0 $name.log '^127.0.0.1 - .*"GET http:'
		counts 0 $name.log 'why='
	done
}

# 32 clients ask the program on PORT for 2,000 objects at random, 24,000 times in
# all, in the background, as $real_load: real_load PORT
real_load() {
	load_origin
	"$peer" measure -x "$1" -k 2000 -r "$origin_port" 32 24000 60000 1024 > load &
	real_load=$!
}

# They are answered but for N: sets $hits to those of 10,000 requests that were
# not the origin's: real_loaded N
real_loaded() {
	wait "$real_load"
	read -r loaded_done loaded_s loaded_errors _ < load
	[ "$loaded_done" -ge $((24000 - 32 - $1)) ] &&
		[ "$loaded_errors" -le "$1" ] ||
		fail "$loaded_done answers in $loaded_s s, $loaded_errors errors"
	loaded_asked=$(od -A n -t uL far.asked | tr -d ' ')
	hits=$(((loaded_done - loaded_asked) * 10000 / loaded_done))
}

test_real_haproxy_load() { # three proxies behind haproxy, one killed and started again: as many hits as one big cache, and what was not on its way there is answered
	have haproxy || skip "no haproxy"
	sanitized && skip "$special is slow"
	real_ready
	start_proxy -c "$T/cache.one"
	real_load "${proxy##*:}"
	real_loaded 0
	one=$hits
	[ "$one" -gt 9000 ] || fail "one cache: $one of 10000 are hits"
	stop_proxy
	real_haproxy
	real_load "$real_p1"
	wait_for 60 '[ "$(wc -l < b.log)" -gt 3000 ]' || fail "b is not asked"
	real_kill_b
	"$peer" sleep 300
	real_behind b "$b"
	before=$(wc -l < b.log)
	real_loaded 32
	[ "$(wc -l < b.log)" -gt "$before" ] || fail "b is not asked again"
	[ $((one - hits)) -le 300 ] ||
		fail "hits of 10000: $hits, and $one with one cache"
}

test_real_squid_parents() { # squid as the manual has it: each URL to one of two parents
	have squid || skip "no squid"
	origin o 'replies 200 Cache-Control: no-store | ok\l'
	real_ready
	real_ports
	name=a start_proxy
	a=$proxy
	name=b start_proxy
	real_example squid.conf | sed -e "/^http_port/d" -e '/^cache deny/d' \
	    -e 's/^acl clients .*/acl clients src 127.0.0.0\/8/' \
	    -e "s/^cache_peer 10.0.0.11 parent 3128/cache_peer 127.0.0.1 parent ${a##*:}/" \
	    -e "s/^cache_peer 10.0.0.12 parent 3128/cache_peer 127.0.0.1 parent ${proxy##*:}/" \
	    > example.conf
	grep -c '^cache_peer 127' example.conf | grep -x 2 > /dev/null ||
		fail "the example: $(cat example.conf)"
	real_squid_spawn "$real_p1" "$(cat example.conf)"
	wait_for 20 '"$peer" client "127.0.0.1:$real_p1" up < /dev/null
		[ "$(cat up.end)" = open ]' ||
		fail "squid does not start: $(tail -n 1 squid.out)"
	real_asks 127.0.0.1 1 60
	real_answered 127.0.0.1 1 60
	real_asks 127.0.0.1 31 90
	real_answered 127.0.0.1 31 90
	real_asked 127.0.0.1 a b > asked
	[ "$(wc -l < asked)" = 120 ] && [ "$(sort -u asked | wc -l)" = 90 ] ||
		fail "$(wc -l < asked) requests, $(sort -u asked | wc -l) ways"
	for name in a b; do
		[ "$(grep -c " $name\$" asked)" -gt 10 ] || fail "$name is not asked"
	done
}

# ---- 32. Measurements -------------------------------------------------------

# test.sh bench: what the proxy costs beside no proxy and beside others, in
# one run and in turns, because machines are noisy. Not a test. OLD: the path
# of another build of the proxy, which is measured, too.

bench_rounds=3  # of each measurement; the median counts
bench_ms=800    # that a measurement with small requests takes
bench_idle=4000 # tunnels
bench_most=20000 # descriptors, for as many tunnels as they are enough for
bench_forks=    # processes of which the children count

# Microseconds of processor time that a process has used; with the workers of a
# proxy that is on bench_forks.
bench_cpu() { # PID
	bench_used=0
	# shellcheck disable=SC2046 # several
	case " $bench_forks " in
	*" $1 "*) set -- $(children "$1") ;;
	esac
	for bench_of; do
		bench_used=$((bench_used + $(processor_time "$bench_of") * 10000))
	done
	echo $bench_used
}

# Takes a proxy into the race if it serves within 20 seconds; its place is in
# NAME.where.
bench_add() { # NAME PORT PID
	bench_until=$(($("$peer" clock) + 20000))
	until [ "$("$peer" measure -x "$2" "$origin" 1 1 1000 1024 |
	    cut -d ' ' -f 1,3)" = '1 0' ]; do
		if [ "$("$peer" clock)" -ge "$bench_until" ]; then
			echo "$1 does not serve and is left out"
			return
		fi
		"$peer" sleep 50
	done
	echo "$2 $3" > "$1.where"
	bench_names="$bench_names $1"
}

# A tinyproxy takes part, if there is one.
bench_tinyproxy() { # PORT LINE-OF-ITS-CONFIGURATION...
	have tinyproxy || return
	bench_port=$1
	shift
	printf '%s\n' "Port $bench_port" 'Listen 127.0.0.1' \
		'LogLevel Critical' "$@" > tinyproxy.conf
	spawn tinyproxy.out tinyproxy -d -c tinyproxy.conf
	bench_add tinyproxy "$bench_port" "$spawned"
}

# Another build of the proxy, if there is one.
bench_old() { # OPTION...
	[ -n "${OLD-}" ] || return 0
	bench_new=$proxy_bin
	proxy_bin=$OLD
	name=old start_proxy "$@"
	proxy_bin=$bench_new
	bench_add old "${proxy##*:}" "$proxy_pid"
}

# Proportional memory of a process and its children in MiB; - if the system does
# not tell.
bench_proportional() { # PID
	for bench_child in "$1" $(children "$1"); do
		cat "/proc/$bench_child/smaps_rollup" 2> /dev/null
	done | awk '$1 == "Pss:" { n += $2 }
		END { print n ? sprintf("%.2f", n / 1024) : "-" }'
}

# Of each candidate, right after it has started.
bench_start() {
	printf '\nMemory at the start, MiB: in proportion to who shares it\n'
	for name in $bench_names; do
		read -r port pid < "$name.where"
		printf '%-14s%10s\n' "$name" "$(bench_proportional "$pid")"
	done
}

bench_proxies() {
	spawn relay.out "$peer" relay relay "$origin"
	wait_for 5 '[ -s relay ]' || fail "no relay"
	bench_add relay "$(cat relay)" "$spawned"
	start_proxy -m $((bench_idle + 100))
	bench_add proxy "${proxy##*:}" "$proxy_pid"
	bench_old -m $((bench_idle + 100))
	real_ports
	bench_tinyproxy "$real_p1" 'Timeout 600' "MaxClients $((bench_idle + 100))"
	if have squid; then
		real_squid_spawn "$real_p2" 'max_filedescriptors 16384'
		bench_add squid "$real_p2" "$spawned"
	fi
	real_ports
	if have haproxy; then
		cat > haproxy.conf <<-EOF
			global
				nbthread 1
				maxconn 1000
			defaults
				mode http
				timeout client 60s
				timeout server 60s
				timeout connect 5s
			frontend clients
				bind 127.0.0.1:$real_p1
				default_backend servers
			backend servers
				http-reuse always
				server origin 127.0.0.1:$origin
		EOF
		spawn haproxy.out haproxy -db -f haproxy.conf
		bench_add haproxy "$real_p1" "$spawned"
	fi
	bench_start
	# What it costs to record everything; a second one shares its pages.
	name=w start_proxy -w bench.har -m $((bench_idle + 100))
	bench_add "recording" "${proxy##*:}" "$proxy_pid"
}

bench_asked() { # how often the origin was asked for what a cache may keep
	od -A n -t uL port.asked
}

# One measurement: a line "requests/s, own us, everybody's us, errors, asked,
# requests, us of all but the slowest 1 %" in WORK.NAME; the second and third
# are processor time per request.
bench_one() { # WORK NAME FLAGS CONNS REQUESTS MS SIZE
	bench_work=$1 bench_name=$2 bench_flags=$3 bench_pid=$$
	shift 3
	if [ "$bench_name" != direct ]; then
		read -r bench_port bench_pid < "$bench_name.where"
		bench_flags="$bench_flags -x $bench_port"
	fi
	bench_own=$(bench_cpu "$bench_pid") bench_origin=$(bench_cpu "$origin_pid")
	bench_before=$(bench_asked)
	# shellcheck disable=SC2086 # flags are words
	"$peer" measure $bench_flags "$origin" "$@" > result
	awk -v own=$(($(bench_cpu "$bench_pid") - bench_own)) \
		-v origin=$(($(bench_cpu "$origin_pid") - bench_origin)) \
		-v asked=$(($(bench_asked) - bench_before)) \
		-v name="$bench_name" '{
			if (name == "direct")
				own = 0
			n = $1 ? $1 : 1
			print $1 / $2, own / n, (own + origin + $4) / n, $3,
				asked, $1, $5
		}' result >> "$bench_work.$bench_name"
}

bench_median() { # FILE COLUMN
	cut -d ' ' -f "$2" "$1" | sort -n | awk '{ v[NR] = $1 }
		END { print v[int((NR + 1) / 2)] }'
}

# One table; rates are multiplied by SCALE, times per request divided by it.
# Of what may be cached it says how many of the requests reached the origin.
bench_table() { # WORK TITLE UNIT SCALE
	printf '\n%s\n' "$2"
	for name in direct $bench_names; do
		[ -f "$1.$name" ] || continue
		echo "$name" "$(bench_median "$1.$name" 1)" \
			"$(bench_median "$1.$name" 2)" \
			"$(bench_median "$1.$name" 3)" \
			"$(awk '{ n += $4; asked += $5; all += $6 }
				END { print n, asked "/" all }' "$1.$name")"
	done | awk -v unit="$3" -v scale="$4" '
		NR == 1 {
			rate = $2; all = $4; kept = $6 !~ /^0/
			printf "%-14s%10s%11s%15s%15s%s\n", "", unit "/s",
				"of direct", "own us/" unit, "all, of direct",
				kept ? sprintf("%15s", "asked origin") : ""
		}
		{
			printf "%-14s%10.0f%11.3f", $1, $2 * scale, $2 / rate
			printf NR == 1 ? "%15s" : "%15.1f", NR == 1 ? "-" : $3 / scale
			printf "%15.2f", $4 / all
			if (kept)
				printf "%15s", $6
			if (kept && NR > 1 && $6 !~ /^0\//)
				printf "  NOT ALL HITS"
			print $5 ? "  errors: " $5 : ""
		}'
}

bench_resident() { # PID: KiB
	ps -o rss= -p "$1" | tr -d ' '
}

# So many idle tunnels through a proxy, as many as it takes at most, are
# written to stand.NAME: bench_stand NAME TUNNELS
bench_stand() {
	rm -f "far.$1" "stand.$1"
	read -r port pid < "$1.where"
	spawn far.out "$peer" load "far.$1"
	wait_for 5 "[ -s 'far.$1' ]" || return
	spawn idle.out "$peer" idle "$port" "$(cat "far.$1")" "$2" "stand.$1"
	wait_for 60 "[ -s 'stand.$1' ]"
}

# One measurement of each that takes tunnels.
bench_each() { # WORK FLAGS CONNS SIZE
	for name in direct $names; do
		bench_one "$1" "$name" "$2" "$3" 1000000 "$bench_ms" "$4"
	done
}

# Beside idle tunnels, which all candidates hold at the same time.
bench_tunnels() {
	names=
	for name in $bench_names; do
		case $name in
		relay | haproxy) ;;
		*) names="$names $name" ;;
		esac
	done
	round=0
	while [ $((round += 1)) -le "$bench_rounds" ]; do
		bench_each ping -c 16 64
	done
	printf '\nMemory with %d idle tunnels\n%-14s%10s%15s\n' "$bench_idle" \
		'' 'tunnels' 'KiB a tunnel'
	for name in $names; do
		read -r port pid < "$name.where"
		before=$(bench_resident "$pid")
		bench_stand "$name" "$bench_idle" || continue
		awk -v name="$name" -v before="$before" \
			-v after="$(bench_resident "$pid")" '{
				printf "%-14s%10d%15.2f\n", name, $1,
					$1 ? (after - before) / $1 : 0
			}' "stand.$name"
	done
	round=0
	while [ $((round += 1)) -le "$bench_rounds" ]; do
		bench_each few '' 1 1024
		bench_each idle '' 32 1024
		bench_each pings -c 16 64
	done
	bench_table few "GET 1 KiB, 1 connection beside $bench_idle idle tunnels" \
		request 1
	bench_table idle \
		"GET 1 KiB, 32 connections beside $bench_idle idle tunnels" request 1
	printf '\n64 bytes on 16 tunnels beside %d idle ones, and beside none\n' \
		"$bench_idle"
	printf '%-14s%15s%11s%15s%11s\n' '' 'own us/request' 'of none' \
		'99 % took us' 'of none'
	for name in direct $names; do
		echo "$(bench_median "pings.$name" 2)" "$(bench_median "ping.$name" 2)" \
			"$(bench_median "pings.$name" 7)" \
			"$(bench_median "ping.$name" 7)" | awk -v name="$name" '{
				printf "%-14s%15.1f%11.2f%15d%11.2f\n", name, $1,
					$2 ? $1 / $2 : 1, $3, $4 ? $3 / $4 : 1
			}'
	done
}

# As many tunnels as a process with so many descriptors takes.
bench_descriptors() (
	# shellcheck disable=SC3045 # where it is not known, nothing is shown
	ulimit -n "$bench_most" 2> /dev/null || exit
	name=most start_proxy -m "$bench_most"
	bench_add proxy "${proxy##*:}" "$proxy_pid"
	real_ports
	bench_tinyproxy "$real_p1" 'Timeout 600' "MaxClients $bench_most"
	if have squid; then
		real_squid_spawn "$real_p2" "max_filedescriptors $bench_most"
		bench_add squid "$real_p2" "$spawned"
	fi
	printf '\nTunnels in %d descriptors\n' "$bench_most"
	for name in $bench_names; do
		bench_stand "$name" "$bench_most" || echo - > "stand.$name"
		printf '%-14s%10s\n' "$name" "$(cat "stand.$name")"
	done
	bench_clear
)

bench_clear() { # ends the candidates
	for name in $bench_names; do
		read -r port pid < "$name.where"
		kill "$pid"
		rm "$name.where"
	done
	bench_names=
}

bench_cache_squid() { # PORT
	mkdir squid.store
	bench_user=
	if [ "$(id -u)" -eq 0 ]; then
		bench_user='cache_effective_user nobody'
		chmod 711 "$work" "$T"
		chown nobody squid.store
	fi
	real_squid_spawn "$1" "$bench_user
		max_filedescriptors 16384
		cache_mem 256 MB
		maximum_object_size 64 MB
		cache_dir aufs $T/squid.store 1024 16 256" 'cache allow all'
	bench_add squid "$1" "$spawned"
}

bench_cache_nginx() { # PORT
	cat > nginx.conf <<-EOF
		daemon off; master_process off; pid $T/nginx.pid;
		error_log $T/nginx.err; worker_rlimit_nofile 16384;
		events { worker_connections 8192; }
		http {
			access_log off; sendfile on; tcp_nopush on;
			keepalive_requests 1000000000;
			client_body_temp_path $T/t1; proxy_temp_path $T/t2;
			fastcgi_temp_path $T/t3; uwsgi_temp_path $T/t4;
			scgi_temp_path $T/t5;
			proxy_cache_path $T/nginx.store levels=1:2
				keys_zone=all:16m max_size=1g use_temp_path=off;
			server {
				listen 127.0.0.1:$1;
				location / {
					proxy_pass http://\$http_host\$request_uri;
					proxy_cache all;
					proxy_cache_key \$http_host\$request_uri;
				}
			}
		}
	EOF
	spawn nginx.out nginx -c "$T/nginx.conf"
	bench_add nginx "$1" "$spawned"
}

bench_cache_traffic() { # PORT
	mkdir -p traffic/etc traffic/log traffic/run traffic/store
	printf '%s\n' "prefix: $T/traffic" "sysconfdir: $T/traffic/etc" \
		"localstatedir: $T/traffic" "logdir: $T/traffic/log" \
		"runtimedir: $T/traffic/run" > traffic/root.yaml
	sed 's/^/CONFIG proxy.config./' > traffic/etc/records.config <<-EOF
		http.server_ports STRING $1:ip-in=127.0.0.1
		reverse_proxy.enabled INT 0
		url_remap.remap_required INT 0
		exec_thread.autoconfig INT 0
		exec_thread.limit INT 1
		cache.ram_cache.size INT 268435456
		log.logging_enabled INT 0
		crash_log_helper STRING NULL
		admin.user_id STRING #-1
	EOF
	echo "$T/traffic/store 1G" > traffic/etc/storage.config
	printf '%s\n' 'ip_allow:' '  - apply: in' '    ip_addrs: 127.0.0.1' \
		'    action: allow' '    methods: ALL' > traffic/etc/ip_allow.yaml
	spawn traffic.out traffic_server --run-root="$T/traffic/root.yaml"
	bench_add trafficserver "$1" "$spawned"
}

bench_cache_proxies() {
	name=cache start_proxy -c "$T/store" -s 1G
	bench_add proxy "${proxy##*:}" "$proxy_pid"
	bench_old -c "$T/store.old" -s 1G
	real_ports
	have squid && bench_cache_squid "$real_p1"
	have nginx && bench_cache_nginx "$real_p2"
	real_ports
	have traffic_server && bench_cache_traffic "$real_p1"
}

# Twice, so that what a first answer missed gets in too.
bench_warm_up() {
	for name in $bench_names $bench_names; do
		read -r port pid < "$name.where"
		"$peer" measure -x "$port" -k 1 "$origin" 1 1 5000 1024
		"$peer" measure -x "$port" -k 1 "$origin" 1 1 10000 16777216
		"$peer" measure -x "$port" -k 10000 "$origin" 8 10000 20000 8192
	done > warm.out
}

bench_caches() {
	bench_clear
	bench_cache_proxies
	bench_warm_up
	round=0
	while [ $((round += 1)) -le "$bench_rounds" ]; do
		for name in direct $bench_names; do
			bench_one hit "$name" '-k 1' 32 1000000 "$bench_ms" 1024
			bench_one hits "$name" '-k 10000 -r' 32 1000000 \
				"$bench_ms" 8192
			bench_one big "$name" '-k 1' 1 1000000 "$bench_ms" 16777216
		done
	done
	echo
	echo "Caches of 1 GiB on disk that have what is asked for. squid and"
	echo "trafficserver hold 256 MiB in memory beside (but no object of 16 MiB,"
	echo "as they come), proxy and nginx leave that to the system."
	bench_table hit 'Hit: GET 1 KiB, one object, 32 kept connections' request 1
	bench_table hits \
		'Hit: GET 8 KiB, 10000 objects at random, 32 kept connections' \
		request 1
	bench_table big 'Hit: GET 16 MiB, one object, 1 kept connection' MiB 16
}

# A thousand hosts, a hundred expressions, and a million domains that look like
# those of lists for blocking; the rules for them, and a filter of tinyproxy.
bench_rules_write() {
	awk 'BEGIN {
		for (i = 0; i < 1000; i++)
			print "deny host ads" i ".example" > "1000-hosts.rules"
		for (i = 0; i < 25; i++)
			print "deny url ^http://ads" i "[.][a-z0-9.-]+/\n" \
				"deny url /(banner|popup)" i "/.*[.](gif|js)$\n" \
				"deny url [?&]track" i "=[0-9a-f]+\n" \
				"deny url [.]stat" i "[.](com|net|org)/" \
				> "100-urls.rules"
		print "deny list domains" > "million-list.rules"
		subs = split("ads. www. cdn. click. t.img. metrics. x-", sub_)
		tops = split("com net de co.uk info xyz com.br ru", top)
		for (i = 0; i < 1000000; i++)
			printf "%s%c%s%d.%s\n", sub_[i % (subs + 2) + 1],
				97 + i % 26, i % 3 ? "track-" : "ad", i,
				top[int(i / 7) % tops + 1] > "domains"
	}'
}

# With rules of which none holds. The origin is the parent of all, so that any
# name can be asked for.
bench_rules() {
	bench_clear
	bench_rules_write
	for name in proxy 1000-hosts 100-urls million-list; do
		[ "$name" != proxy ] || : > proxy.rules
		start_proxy -x "http://127.0.0.1:$origin" -f "$name.rules"
		bench_add "$name" "${proxy##*:}" "$proxy_pid"
		bench_bare=${bench_bare:-$(bench_resident "$proxy_pid")}
	done
	bench_bytes=$((($(bench_resident "$proxy_pid") - bench_bare) * 1024))
	real_ports
	bench_tinyproxy "$real_p1" 'MaxClients 100' \
		"Upstream http 127.0.0.1:$origin" "Filter \"$T/domains\"" \
		'FilterType fnmatch'
	round=0
	while [ $((round += 1)) -le "$bench_rounds" ]; do
		for name in direct $bench_names; do
			bench_one rules "$name" '-d cdn.static.news.example.com' 32 \
				1000000 "$bench_ms" 1024
		done
	done
	echo
	echo "Rules that don't hold: none at all; lines with a host each; lines with"
	echo "a regular expression each for the URL; a list of a million domains for"
	echo "a host of five labels, in proxy and as tinyproxy's Filter (fnmatch)."
	sed -n 's/^proxy: domains: /The list: /p' million-list.err
	awk -v bytes="$bench_bytes" 'BEGIN {
		printf "Resident memory: %.1f bytes a domain\n", bytes / 1000000 }'
	bench_table rules 'GET 1 KiB through a parent, 32 kept connections' request 1
}

# What -j 2 brings. Client and server need processors, too: on two of them the
# rate can double only if a request costs the proxy far more than it costs them,
# as with expressions that are tried in vain at each of 200 digits. Without, look
# at the processor time: as long as a request needs no more of it, each further
# processor counts.
bench_workers() {
	bench_clear
	awk 'BEGIN { for (i = 0; i < 48; i++)
		print "deny url [0-9]+x" i }' > dear.rules
	for name in proxy two-workers; do
		bench_j=1
		[ "$name" = proxy ] || bench_j=2
		for bench_rules in /dev/null dear.rules; do
			start_proxy -j $bench_j -f "$bench_rules"
			[ $bench_j = 1 ] || bench_forks="$bench_forks $proxy_pid"
			bench_add "$name" "${proxy##*:}" "$proxy_pid"
			name=$name-dear
		done
	done
	round=0
	while [ $((round += 1)) -le "$bench_rounds" ]; do
		for name in direct proxy two-workers; do
			bench_one workers "$name" '' 64 1000000 "$bench_ms" 1024
			[ "$name" = direct ] || name=$name-dear
			bench_one dear "$name" '-z 200' 64 1000000 \
				$((bench_ms * 3)) 1024
		done
	done
	bench_table workers 'Workers: GET 1 KiB, 64 kept connections' request 1
	bench_table dear \
		'The same with 48 expressions, which take long for this URL' \
		request 1
	for pid in $bench_forks; do
		for bench_of in $(children "$pid"); do
			processor_time "$bench_of"
		done | sort -n | tr '\n' ' '
	done | awk '{ printf "Workers had, s/100 of processor time: %s\n", $0 }'
}

bench_end() {
	cat .fail .skip 2> /dev/null
	cat .pids .proxies 2> /dev/null | while read -r pid; do
		kill "$pid" 2> /dev/null
	done
	exit "$bench_status"
}

# The measurements: test.sh bench
bench() (
	T=$work/bench
	bench_status=1 bench_names=
	mkdir "$T" && cd "$T" || exit 1
	: > .pids
	trap bench_end EXIT
	trap 'exit 1' HUP INT TERM
	# shellcheck disable=SC3045 # for proxies that don't raise it themselves
	ulimit -n "$(ulimit -H -n)" 2> /dev/null
	real_ready
	spawn origin.out "$peer" load port
	origin_pid=$spawned
	wait_for 5 '[ -s port ]' || fail "no origin"
	origin=$(cat port)
	bench_proxies
	large=268435456
	round=0
	while [ $((round += 1)) -le "$bench_rounds" ]; do
		for name in direct $bench_names; do
			bench_one one "$name" '' 1 1000000 "$bench_ms" 1024
			bench_one many "$name" '' 32 1000000 "$bench_ms" 1024
			bench_one new "$name" -n 1 5000 "$bench_ms" 1024
			[ "$name" != relay ] || continue
			bench_one body "$name" '' 1 1 10000 "$large"
			[ "$name" != haproxy ] || continue
			bench_one tunnel "$name" -c 1 1 10000 "$large"
		done
	done
	echo "Medians of $bench_rounds rounds in turns; client, server and proxy"
	echo "share this machine. us are microseconds of processor time: own of"
	echo "the proxy, all of client, server and proxy."
	bench_table one 'GET 1 KiB, 1 kept connection' request 1
	bench_table many 'GET 1 KiB, 32 kept connections' request 1
	bench_table new 'GET 1 KiB, a new connection for each' request 1
	bench_table body 'GET 256 MiB, one' MiB 256
	bench_table tunnel 'GET 256 MiB through CONNECT, one' MiB 256
	bench_tunnels
	bench_clear
	bench_descriptors
	bench_caches
	bench_rules
	bench_workers
	bench_status=0
)

# ---- 33. Model --------------------------------------------------------------

# proxy.c in a program that is all its clients and servers: test.sh model runs
# every play in every way, unit_model with one split at a time.
write_model() {
	cat <<'EOF_MODEL'
/*
 * A model check by exhaustion.  proxy.c runs whole in this process, and this
 * file plays its clients and servers: whenever the loop is about to wait, they
 * take their next step.  Each play of a small grammar is run once as it is, and
 * then in all ways: each split of what the client sends with each split of what
 * the server sends; each two splits of either; byte by byte; and, in each
 * direction, a socket that is full after so many bytes.  All must see the same
 * bytes as the first time, and so must the log.  With an argument, one split at
 * a time.
 */
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE 1
#define _DARWIN_C_SOURCE 1
#define __BSD_VISIBLE 1
#define _FILE_OFFSET_BITS 64
#define _TIME_BITS 64
#ifdef __TINYC__
#define _REGEX_NELTS(n)	/* as in proxy.c */
#endif
#include <sys/types.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <fcntl.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

static int model_poll(struct pollfd *, nfds_t, int);
static ssize_t model_write(int, const void *, size_t);
static int model_connect(int, const struct sockaddr *, socklen_t);
/* Dates and ages are always the same. */
static time_t
model_time(time_t *t)
{
	(void)t;
	return 1700000000;
}

#define poll(fds, n, ms) model_poll(fds, n, ms)
#define write(fd, from, n) model_write(fd, from, n)
#define connect(fd, to, n) model_connect(fd, to, n)
#define time(t) model_time(t)
#define main proxy_main
#include "proxy.c"
#undef poll
#undef write
#undef connect
#undef main

enum { ANSWERS = 6, TEXT = 8192, STUCK = 100 };

struct play {
	const char *name;
	const char *client;           /* what a client sends */
	const char *answers[ANSWERS]; /* what servers send, each in its turn */
	int closes;                   /* the last answer ends with the stream */
	int fresh;                    /* before a run nothing is stored */
	int follower;                 /* a second client asks for the same */
};

#define U "http://127.0.0.1:9/"
#define H "Host: 127.0.0.1:9\r\n"
#define DATE "Date: Tue, 14 Nov 2023 22:13:20 GMT\r\n"
#define OK "HTTP/1.1 200 OK\r\n" DATE

static const struct play plays[] = {
	{ "length", "GET " U "a HTTP/1.1\r\n" H "\r\n",
	    { OK "Content-Length: 3\r\n\r\nabc" }, 0, 0, 0 },
	{ "1.0 and chunks", "GET " U "b HTTP/1.0\r\n\r\n",
	    { OK "Transfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\n1\r\nc\r\n"
	    "0\r\nA: b\r\n\r\n" }, 0, 0, 0 },
	{ "chunks", "GET " U "c HTTP/1.1\r\n" H "\r\n",
	    { OK "Transfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\n1\r\nc\r\n"
	    "0\r\nA: b\r\n\r\n" }, 0, 0, 0 },
	{ "close", "GET " U "d HTTP/1.1\r\n" H "\r\n", { OK "\r\nabc" }, 1, 0,
	    0 },
	{ "HEAD", "HEAD " U "e HTTP/1.1\r\n" H "\r\n",
	    { OK "Content-Length: 3\r\n\r\n" }, 0, 0, 0 },
	{ "POST", "POST " U "f HTTP/1.1\r\n" H "Content-Length: 3\r\n\r\nabc",
	    { OK "Content-Length: 2\r\n\r\nok" }, 0, 0, 0 },
	{ "chunked POST", "POST " U "g HTTP/1.1\r\n" H "Transfer-Encoding: "
	    "chunked\r\n\r\n2;x\r\nab\r\n1\r\nc\r\n0\r\nA: b\r\n\r\n",
	    { OK "Content-Length: 2\r\n\r\nok" }, 0, 0, 0 },
	{ "pipeline", "GET " U "h HTTP/1.1\r\n" H "\r\n"
	    "\r\nPUT " U "i HTTP/1.1\r\n" H "Content-Length: 1\r\n\r\nx"
	    "GET " U "j HTTP/1.1\r\n" H "\r\n",
	    { OK "Content-Length: 1\r\n\r\na",
	    "HTTP/1.1 204 No Content\r\n" DATE "\r\n", OK "\r\nb" }, 1, 0, 0 },
	{ "interim answers", "POST " U "k HTTP/1.1\r\n" H
	    "Expect: 100-continue\r\nContent-Length: 1\r\n\r\nx",
	    { "HTTP/1.1 100 Continue\r\n\r\n"
	    "HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"
	    OK "Content-Length: 1\r\n\r\na" }, 0, 0, 0 },
	{ "mended", "GET " U "l HTTP/1.1\r\n" H "\r\n",
	    { "\r\nHTTP/1.1 200 OK\n" DATE "A : b\nContent-Length: 1\n\na" }, 0,
	    0, 0 },
	{ "tunnel", "CONNECT 127.0.0.1:9 HTTP/1.1\r\n" H "\r\nabcd",
	    { "efgh" }, 0, 0, 0 },
	{ "upgrade", "GET " U "m HTTP/1.1\r\n" H "Connection: upgrade\r\n"
	    "Upgrade: x\r\n\r\nabc",
	    { "HTTP/1.1 101 Switching\r\nConnection: upgrade\r\n"
	    "Upgrade: x\r\n\r\ndef" }, 0, 0, 0 },
	{ "socks", "GET " U "socks HTTP/1.1\r\n" H "\r\n",
	    { "\5", "\5", OK "Content-Length: 1\r\n\r\na" }, 0, 0, 0 },
	{ "refused", "GET " U "n HTTP/1.1\r\n" H "A : b\r\n\r\n", { NULL }, 0,
	    0, 0 },
	{ "broken chunk", "GET " U "o HTTP/1.1\r\n" H "\r\n",
	    { OK "Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\nx" }, 0, 0, 0 },
	{ "cut", "GET " U "p HTTP/1.1\r\n" H "\r\n",
	    { OK "Content-Length: 4\r\n\r\nab" }, 1, 0, 0 },
	{ "stored", "GET " U "s HTTP/1.1\r\n" H "\r\n",
	    { OK "Cache-Control: max-age=9\r\nContent-Length: 3\r\n\r\nabc" },
	    0, 1, 0 },
	{ "stored chunks", "GET " U "s HTTP/1.1\r\n" H "\r\n",
	    { OK "Cache-Control: max-age=9\r\nTransfer-Encoding: chunked\r\n"
	    "\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n" }, 0, 1, 0 },
	{ "followed", "GET " U "s HTTP/1.1\r\n" H "\r\n",
	    { OK "Cache-Control: max-age=9\r\nContent-Length: 3\r\n\r\nabc" },
	    0, 1, 1 },
	/* The last run above has left an entry. */
	{ "hit", "GET " U "s HTTP/1.1\r\n" H "\r\n", { NULL }, 0, 0, 0 },
	{ "range of a hit", "GET " U "s HTTP/1.1\r\n" H "Range: bytes=1-1\r\n"
	    "\r\n", { NULL }, 0, 0, 0 },
	{ "validated", "GET " U "u HTTP/1.1\r\n" H "\r\n"
	    "GET " U "u HTTP/1.1\r\n" H "\r\n",
	    { OK "Cache-Control: max-age=0\r\nETag: \"a\"\r\n"
	    "Content-Length: 3\r\n\r\nabc",
	    "HTTP/1.1 304 Not Modified\r\n" DATE "ETag: \"a\"\r\n"
	    "Cache-Control: max-age=0\r\n\r\n" }, 0, 1, 0 },
	{ "superseded", "GET " U "u HTTP/1.1\r\n" H "\r\n"
	    "GET " U "u HTTP/1.1\r\n" H "\r\n",
	    { OK "Cache-Control: max-age=0\r\nETag: \"a\"\r\n"
	    "Content-Length: 3\r\n\r\nabc",
	    OK "Cache-Control: max-age=0\r\nETag: \"b\"\r\n"
	    "Content-Length: 4\r\n\r\ndefg" }, 0, 1, 0 },
};
enum { PLAYS = sizeof(plays) / sizeof(plays[0]) };

/* What a play's strings can't say: NUL bytes of the SOCKS replies. */
static const struct { const char *at; size_t n; } replies[] = {
	{ "\5\0", 2 }, { "\5\0\0\1\0\0\0\0\0\0", 10 }
};

/* The kinds of ways to run a play, in their order. */
enum kind { ONCE, BOTH, CLIENT_TWICE, SERVER_TWICE, BYTES, CLIENT_FULL,
	SERVER_FULL, KINDS };

/* One way. */
struct way {
	int kind;
	size_t client[2], server[2]; /* where they are split; 0: not */
	int bytewise;                /* bits: 1 what the client sends, 2 server */
	size_t full;                 /* bytes after which a socket is full */
};

/* A client, or a server: one end of a connection to the proxy. */
struct party {
	int fd;                 /* or -1 */
	int eof;                /* it has ended */
	size_t sent;            /* bytes to the proxy */
	size_t n;               /* bytes from it */
	char got[TEXT];
};

static struct party client, server, follower;
static struct way way;
static char server_text[TEXT], logged[TEXT];
static size_t server_n, bounds[ANSWERS + 1], answers_n, logged_n;
static size_t asked[ANSWERS]; /* bytes that the server has before an answer */
static size_t written[3];     /* bytes to the client (1), to the server (2) */
static int play_at = -1, stage, stuck, waited, quick;
static unsigned long runs;

/* What was seen the first time. */
static struct seen {
	char text[4 * TEXT];
	size_t n;
} expected, found;

/* The proxy's sweeper may still have a copy of the descriptor. */
static void
party_close(struct party *e)
{
	if (e->fd == -1)
		return;
	(void)shutdown(e->fd, SHUT_RDWR);
	close(e->fd);
	e->fd = -1;
}

static int
model_connect(int fd, const struct sockaddr *to, socklen_t n)
{
	int pair[2];

	(void)to;
	(void)n;
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == -1)
		return -1;
	(void)fcntl(pair[0], F_SETFL, O_NONBLOCK);
	(void)dup2(pair[0], fd);
	close(pair[0]);
	party_close(&server);
	server.fd = pair[1];
	server.eof = 0;
	errno = EINPROGRESS;
	return -1;
}

/* Keeps the log.  A socket is full where the way says, and has room then. */
static ssize_t
model_write(int fd, const void *from, size_t n)
{
	const struct exchange *x;
	int side = 0;
	ssize_t put;

	if (fd == STDOUT_FILENO) {
		if (logged_n + n > sizeof(logged))
			abort();
		memcpy(logged + logged_n, from, n);
		logged_n += n;
		return (ssize_t)n;
	}
	for (x = exchanges.slots; x < exchanges.slots + exchanges.used; x++)
		if (x->phase != PHASE_FREE && x->client.fd == fd)
			side = 1;
		else if (x->phase != PHASE_FREE && x->server.fd == fd)
			side = 2;
	if ((side == 1 && way.kind == CLIENT_FULL) ||
	    (side == 2 && way.kind == SERVER_FULL)) {
		if (written[side] == way.full && !waited) {
			waited = 1;
			errno = EAGAIN;
			return -1;
		}
		if (written[side] < way.full && written[side] + n > way.full)
			n = way.full - written[side];
	}
	put = write(fd, from, n);
	if (put > 0)
		written[side] += (size_t)put;
	return put;
}

/* Takes what has come to an end; true if something has. */
static int
party_take(struct party *e)
{
	ssize_t got;

	if (e->fd == -1 || e->eof)
		return 0;
	got = recv(e->fd, e->got + e->n, sizeof(e->got) - e->n, MSG_DONTWAIT);
	if (got == -1 && (errno == EAGAIN || errno == EWOULDBLOCK))
		return 0;
	if (got <= 0)
		e->eof = 1;
	else
		e->n += (size_t)got;
	return 1;
}

/* A connection to the proxy. */
static int
client_open(void)
{
	struct sockaddr_un un = { .sun_family = AF_UNIX,
		.sun_path = "model.sock" };
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	if (fd == -1 || connect(fd, (struct sockaddr *)&un, sizeof(un)) == -1)
		abort();
	return fd;
}

static void
seen_add(const char *title, const char *text, size_t n)
{
	found.n += (size_t)sprintf(found.text + found.n, "-- %s\n", title);
	memcpy(found.text + found.n, text, n);
	found.n += n;
	found.text[found.n] = '\0';
}

/*
 * The same for messages.  How a body is cut into chunks may differ, so all
 * chunks of one are written as one, without sizes.
 */
static void
seen_messages(const char *title, const char *text, size_t n)
{
	static char to[TEXT];
	const char *at = text, *end = text + n, *head;
	size_t k = 0, size;
	char *rest;

	while (at < end) {
		head = at;
		while (at < end && (at - head < 4 || memcmp(at - 4,
		    "\r\n\r\n", 4) != 0))
			to[k++] = *at++;
		to[k] = '\0';
		if (strstr(to + k - (at - head), "chunked\r\n") == NULL)
			continue;
		while (at < end) {
			size = strtoul(at, &rest, 16);
			if (rest == at || rest + 2 > end || size == 0)
				break;
			at = rest + 2;
			size = size < (size_t)(end - at) ? size :
			    (size_t)(end - at);
			memcpy(to + k, at, size);
			k += size;
			at += size;
			at += end - at < 2 ? end - at : 2;
		}
	}
	seen_add(title, to, k);
}

/*
 * The log without what depends on the time: of two clients, either may be
 * first.
 */
static size_t
log_clean(char *to)
{
	static const char *const times[] = { " dns=", " connect=", " first=",
		" total=", NULL };
	static char line[TEXT];
	const char *second;
	size_t i, n = 0, k;

	for (i = 0; i < logged_n; i++) {
		to[n++] = logged[i];
		for (k = 0; times[k] != NULL; k++) {
			size_t len = strlen(times[k]);

			if (n < len || memcmp(to + n - len, times[k], len) != 0)
				continue;
			while (i + 1 < logged_n && (is_digit(logged[i + 1]) ||
			    logged[i + 1] == '-'))
				i++;
		}
	}
	to[n] = '\0';
	second = strchr(to, '\n');
	if (second != NULL && strstr(second, "miss=") != NULL &&
	    strstr(to, "hit=") != NULL && strstr(to, "hit=") < second) {
		k = (size_t)(second + 1 - to);
		memcpy(line, to, k);
		memmove(to, to + k, n - k);
		memcpy(to + n - k, line, k);
	}
	return n;
}

static void
fail(const char *why)
{
	const struct play *p = &plays[play_at];

	dprintf(2, "model: %s: %s, kind %d, client split at %lu %lu, server at "
	    "%lu %lu, bytewise %d, full at %lu\n-- expected --\n%s-- found --\n"
	    "%s\n",
	    p->name, why, way.kind, (unsigned long)way.client[0],
	    (unsigned long)way.client[1], (unsigned long)way.server[0],
	    (unsigned long)way.server[1], way.bytewise, (unsigned long)way.full,
	    expected.text, found.text);
	_exit(1);
}

/* Ends a run: what was seen must be what was expected. */
static void
run_end(void)
{
	static char clean[TEXT];

	found.n = 0;
	seen_messages("the client", client.got, client.n);
	seen_messages("the server", server.got, server.n);
	seen_messages("the follower", follower.got, follower.n);
	seen_add("the log", clean, log_clean(clean));
	if (way.kind == ONCE)
		expected = found;
	else if (found.n != expected.n ||
	    memcmp(found.text, expected.text, found.n) != 0)
		fail("not the same");
	runs++;
}

/* Begins a play: joins what its servers send. */
static void
play_begin(const struct play *p)
{
	size_t n;

	server_n = answers_n = 0;
	while (answers_n < ANSWERS && p->answers[answers_n] != NULL) {
		bounds[answers_n] = server_n;
		n = strlen(p->answers[answers_n]);
		if (p->answers[answers_n][0] == '\5') {
			n = replies[answers_n].n;
			memcpy(server_text + server_n, replies[answers_n].at,
			    n);
		} else
			memcpy(server_text + server_n, p->answers[answers_n],
			    n);
		server_n += n;
		answers_n++;
	}
	bounds[answers_n] = server_n;
	memset(&way, 0, sizeof(way));
}

/* The next two splits of n bytes; false after the last. */
static int
splits_next(size_t *at, size_t n)
{
	if (++at[1] < n)
		return 1;
	at[1] = ++at[0] + 1;
	return at[1] < n;
}

/* The next way, for so many bytes of the client and the server, or false. */
static int
way_next(size_t c, size_t s)
{
	int more = 0, kind;

	for (;;) {
		if (way.kind == BOTH && (!quick || way.client[0] == 0))
			more = ++way.server[0] < s;
		if (way.kind == BOTH && !more) {
			way.server[0] = 0;
			more = ++way.client[0] < c;
		} else if (way.kind == CLIENT_TWICE && !quick)
			more = splits_next(way.client, c);
		else if (way.kind == SERVER_TWICE && !quick)
			more = splits_next(way.server, s);
		else if (way.kind == BYTES)
			more = ++way.bytewise < 4;
		else if (way.kind == CLIENT_FULL)
			more = ++way.full < client.n;
		else if (way.kind == SERVER_FULL)
			more = ++way.full < server.n;
		if (more)
			return 1;
		kind = way.kind + 1;
		if (kind == KINDS)
			return 0;
		memset(&way, 0, sizeof(way));
		way.kind = kind;
	}
}

static void
run_begin(const struct play *p)
{
	char path[CACHE_PATH];
	struct target t = { 0 };

	if (p->fresh) {
		t.host = text_of("127.0.0.1");
		t.port = 9;
		t.path = text_of(strstr(p->client, ":9/") + 2);
		t.path.len = 2;
		entry_path(key_of(&t), text_of(""), path);
		(void)unlink(path);
	}
	client.n = server.n = follower.n = logged_n = 0;
	client.sent = server.sent = follower.sent = 0;
	client.eof = server.eof = follower.eof = 0;
	memset(written, 0, sizeof(written));
	waited = 0;
	client.fd = client_open();
	stage = 0;
}

/* How many bytes go next: up to a split, or the end. */
static size_t
piece(size_t sent, size_t end, const size_t *splits, int bytewise)
{
	int i;

	for (i = 0; i < 2; i++)
		if (splits[i] > sent && splits[i] < end)
			end = splits[i];
	return bytewise ? 1 : end - sent;
}

/* If the proxy has closed, it must do so each time, so that is no failure. */
static void
party_send(struct party *e, const char *text, size_t n)
{
	(void)send(e->fd, text + e->sent, n, MSG_NOSIGNAL);
	e->sent += n;
}

/* The next step of the play; the loop waits.  True if something was done. */
static int
run_step(const struct play *p)
{
	size_t c = strlen(p->client), i;
	int did;

	did = party_take(&client);
	did = party_take(&server) || did;
	did = party_take(&follower) || did;
	if (did)
		return 1;
	if (stage == 0 && client.sent < c) {
		party_send(&client, p->client,
		    piece(client.sent, c, way.client, way.bytewise & 1));
		return 1;
	}
	if (stage == 0 && p->follower && follower.fd == -1) {
		follower.fd = client_open();
		party_send(&follower, p->client, c);
		return 1;
	}
	if (stage == 0 && server.fd != -1 && server.sent < server_n) {
		for (i = 0; bounds[i + 1] <= server.sent; i++)
			;
		if (way.kind == ONCE && server.sent == bounds[i])
			asked[i] = server.n;
		if (server.n < asked[i])
			return 0;
		party_send(&server, server_text,
		    piece(server.sent, bounds[i + 1], way.server,
			way.bytewise & 2));
		return 1;
	}
	stage++;
	if (stage == 1) {
		if (p->closes && server.fd != -1)
			(void)shutdown(server.fd, SHUT_WR);
	} else if (stage == 2) {
		(void)shutdown(client.fd, SHUT_WR);
		if (follower.fd != -1)
			(void)shutdown(follower.fd, SHUT_WR);
	} else if (stage == 3)
		party_close(&server);
	else if (stage == 4) {
		party_close(&client);
		party_close(&follower);
	} else
		return 0;
	return 1;
}

/* Instead of waiting: the ends take their next step. */
static int
model_poll(struct pollfd *fds, nfds_t n, int ms)
{
	int ready;

	if (fds != poll_set.fds || ms == 0)
		return poll(fds, n, ms);
	for (;;) {
		ready = poll(fds, n, 0);
		if (ready != 0)
			return ready;
		if (play_at >= 0 && stage >= 0) {
			if (run_step(&plays[play_at])) {
				stuck = 0;
				continue;
			}
			if (stage < 4 || exchanges.busy > 0) {
				if (++stuck > STUCK)
					fail("stuck");
				return poll(fds, n, ms < 0 || ms > 20 ? 20 : ms);
			}
			run_end();
			if (way_next(strlen(plays[play_at].client), server_n)) {
				run_begin(&plays[play_at]);
				continue;
			}
		}
		if (++play_at == PLAYS) {
			dprintf(2, "%d plays in %lu ways\n", PLAYS, runs);
			_exit(0);
		}
		play_begin(&plays[play_at]);
		run_begin(&plays[play_at]);
	}
}

int
main(int argc, char **argv)
{
	static char *args[] = { "proxy", "-l", "./model.sock", "-c", "cache",
		"-e", "via socks5://127.0.0.1:9 url /socks$", NULL };

	(void)argv;
	quick = argc > 1;
	server.fd = client.fd = follower.fd = -1;
	return proxy_main(sizeof(args) / sizeof(args[0]) - 1, args);
}
EOF_MODEL
}

# Runs it in this directory: model_run [quick]
model_run() {
	rm -rf cache model.sock
	"$work/model" "$@" > model.out 2> model.err
}

test_unit_model() { # the whole proxy: each split of what comes, and each full socket, gives the same bytes
	built_once model write_model
	model_run quick || fail "$(grep -A 60 '^model:' model.err)"
	has model.err 'plays in [0-9]* ways'
}

# All ways; takes a minute.
model() (
	mkdir "$work/t.model" && cd "$work/t.model" || exit 1
	write_model > "$work/model.c"
	build "$work/model" "$work/model.c"
	if ! [ -x "$work/model" ]; then
		echo "not ok 1 - model: cc: $(head -n 1 "$work/model.errors")"
		echo "0 passed, 1 failed, 0 skipped"
		exit 1
	fi
	if model_run; then
		echo "ok 1 - model: $(tail -n 1 model.err)"
		echo "1 passed, 0 failed, 0 skipped"
	else
		echo "not ok 1 - model: $(sed -n 's/^model: //p' model.err)"
		sed 's/^/# /' model.err
		echo "0 passed, 1 failed, 0 skipped"
		exit 1
	fi
)

# ---- 34. Fuzzing ------------------------------------------------------------

# All rows in one program: what the functions tables_* of this file print, and
# a list of what is in there.
write_tables_unit() {
	echo '#include "unit.h"'
	sed -n 's/^\(tables_[a-z]*\)() {.*/\1/p' "$self" | while read -r tables_part; do
		"$tables_part"
	done > "$work/tables.parts"
	cat "$work/tables.parts"
	echo 'const struct unit_table units[] = {'
	sed -n -e 's/^row_\([a-z0-9_]*\)(struct text in)$/{ "\1", NULL, row_\1 },/p' \
	    -e 's/^ROW(\([a-z0-9_]*\), .*/{ "\1", NULL, row_\1 },/p' \
	    -e 's/^check_\([a-z_]*\)(void)$/{ "\1", check_\1, NULL },/p' "$work/tables.parts"
	echo '{ NULL, NULL, NULL } };'
}

# Input that nobody thought of, for the parsers: test.sh fuzz.  An entry is a
# function that parses one input and asserts what must hold of the result, and
# a row of fuzz_entries.  Input ends at a guard, or fills an exact malloc(3).
# What is left to chance, fuzz_draw(), is the same for the same input.  The
# program is proxy.c with the unit tables, for their helpers; its main is
# libFuzzer's, or with -DFUZZ_PLAIN one of its own.
write_fuzz() {
	printf '#define %s\n' FUZZ 'poll fuzz_poll' 'regcomp fuzz_regcomp'
	write_tables_unit
	cat <<'EOF_FUZZ'
#undef main
#define FUZZ_MAX 2048	/* bytes of an input; -max_len */

static uint64_t fuzz_dice;

/* stderr is never ready: words about bad input would take time. */
int
fuzz_poll(struct pollfd *p, nfds_t n, int ms)
{
	return 0;
}

/* No expression is run, and for some the system's takes all memory. */
int
fuzz_regcomp(regex_t *regex, const char *s, int flags)
{
	memset(regex, 0, sizeof(*regex));
	return *s == '[' ? REG_EBRACK : 0;
}

/* A number below n. */
static size_t
fuzz_draw(size_t n)
{
	return (size_t)(random_mix(fuzz_dice++) % n);
}

/* A length from 1 to most, which must not be 0; more often a short one. */
static size_t
fuzz_piece(size_t most)
{
	return 1 + fuzz_draw(fuzz_draw(most) + 1);
}

/* The bytes of b, right before the other guard. */
static struct text
fuzz_built(const struct buffer *b)
{
	assert(b->overflow == 0);
	return at_guard(1, b->data + b->start, buffer_len(b));
}

static bool
fuzz_within(struct text part, struct text whole)
{
	return part.len == 0 || (part.at >= whole.at &&
	    part.at + part.len <= whole.at + whole.len);
}

/* The length of the head in t: the same when t comes in pieces. */
static size_t
fuzz_head(struct text t, bool lenient)
{
	size_t n = 0, seen = 0, seen_piece = 0;
	int whole = head_find(t, &seen, lenient), piece;

	while ((piece = head_find(at_guard(1, t.at, n), &seen_piece,
	    lenient)) == 0 && n < t.len)
		n += fuzz_piece(t.len - n);
	assert(piece == whole && whole <= (int)t.len);
	return whole > 0 ? (size_t)whole : 0;
}

/* Appends the fields of h, in which nothing may stand but what is allowed. */
static void
fuzz_fields(const struct head *h, struct buffer *b)
{
	static const char *const none[] = { NULL };
	size_t i;

	for (i = 0; i < h->n; i++) {
		struct text value = field_value(h, i);

		assert(text_is_token(field_name(h, i)));
		assert(text_is_clean(value));
		assert(text_trim(value).len == value.len);
	}
	fields_append(b, h, none);
}

/* A request that is understood means the same when it is written anew. */
static void
fuzz_request(struct text in)
{
	static struct request q, r;
	struct buffer *b = (struct buffer *)(void *)guarded(0, sizeof(*b));
	size_t n = fuzz_head(in, false);

	b->start = b->end = BUFFER_ROOM;
	arrive(b, in.at, n > 0 ? n : in.len);
	if (in.len == 0 || request_hopeless(b, n > 0) != REFUSE_NONE || n == 0)
		return;
	request_clean(b);
	if (request_parse(buffer_text(b), &q) != 1)
		return;
	(void)request_is_last(&q);
	(void)request_passed_here(&q);
	b = work_buffer(WORK_HEAD);
	buffer_print(b, "%.*s %.*s HTTP/1.%u\r\n", (int)q.name.len, q.name.at,
	    (int)q.uri.len, q.uri.at, q.minor);
	fuzz_fields(&q.head, b);
	assert(request_parse(fuzz_built(b), &r) == 1 && r.method == q.method &&
	    r.framing == q.framing && r.length == q.length &&
	    r.head.n == q.head.n && r.target.port == q.target.port &&
	    text_equals(r.target.host, q.target.host));
}

/* So does a response, which then needs no repair. */
static void
fuzz_response(struct text in)
{
	static const enum method methods[] = { METHOD_GET, METHOD_HEAD,
		METHOD_CONNECT };
	static struct response r, s;
	enum method method = methods[fuzz_draw(COUNT(methods))];
	struct buffer *b = work_buffer(WORK_HEAD);

	in = at_guard(0, in.at, fuzz_head(in, true));
	if (in.len == 0 || response_parse(in, method, &r) != 1)
		return;
	status_append(b, 1, r.status, r.reason);
	fuzz_fields(&r.head, b);
	assert(response_parse(fuzz_built(b), method, &s) == 1 &&
	    s.status == r.status && s.framing == r.framing &&
	    s.head.n == r.head.n && s.mended == 0);
	assert(r.framing != FRAMING_LENGTH || s.length == r.length);
}

/*
 * Chunks in pieces are what they are in one, and what chunks_judge() says; it
 * knows no limits, and so gets little.
 */
static void
fuzz_chunks(struct text in)
{
	static struct outcome one, two;
	char s[1025], payload[1025];
	size_t cut[1024], cuts = 0, n, end, sum;
	int verdict;

	if (!text_copy(in, s, sizeof(s)) && in.len >= sizeof(s))
		return;
	for (n = 0; n < in.len; cut[cuts++] = n)
		n += fuzz_piece(in.len - n);
	decode_pieces(FRAMING_CHUNKED, 0, in, cut, 0, &one);
	decode_pieces(FRAMING_CHUNKED, 0, in, cut, cuts, &two);
	verdict = chunks_judge(s, in.len, &end, payload, &sum);
	assert(one.n == sum && memcmp(one.bytes, payload, sum) == 0);
	assert(two.n == sum && memcmp(two.bytes, payload, sum) == 0);
	assert(one.whole == (verdict == 1) && one.whole != one.broken &&
	    one.whole == two.whole && one.broken == two.broken);
	assert(!one.whole ||
	    (one.over == in.len - end && one.over == two.over));
}

/* A date, and none that is cut, is the same when it is written. */
static void
fuzz_date(struct text in)
{
	int64_t date = date_parse(in);
	time_t wall = now.wall;

	if (date == -1)
		return;
	assert(date_parse(text_cut(in.at, in.len - 1)) == -1);
	now.wall = (time_t)date;
	/* A leap second may be the first one of the year 10000. */
	assert(date == 253402300800 || date_parse(text_of(date_now(DATE_HTTP))) == date);
	now.wall = wall;
}

/* Response fields, and behind a ">" those of a request. */
static void
fuzz_freshness(struct text in)
{
	static const int statuses[] = { 200, 206, 302, 404 };
	static struct request q;
	static struct response r;
	struct buffer *b = work_buffer(WORK_HEAD);
	struct buffer *c = work_buffer(WORK_REGION);
	struct text fields = part_next(&in);
	struct control asked, control;
	int64_t age, lifetime;
	struct entry e;

	buffer_print(b, "HTTP/1.1 %d X\r\n%.*s\r\n\r\n",
	    statuses[fuzz_draw(COUNT(statuses))], (int)fields.len, fields.at);
	buffer_print(c, "GET http://h/ HTTP/1.0\r\n%.*s\r\n\r\n", (int)in.len,
	    in.at);
	in = at_guard(0, c->data + c->start, buffer_len(c));
	if (response_parse(fuzz_built(b), METHOD_GET, &r) != 1 ||
	    request_parse(in, &q) != 1)
		return;
	asked = control_parse(&q.head);
	control = control_parse(&r.head);
	lifetime = freshness_lifetime(&r, &control, false).seconds;
	age = initial_age(&r, now.wall - 2, now.wall);
	assert(lifetime >= -1 && age >= 2);
	if (reuse_judge(&asked, &control, age, lifetime) == REUSE_FRESH)
		assert(age < lifetime && reuse_judge(&asked, &control, age / 2,
		    lifetime) == REUSE_FRESH);
	(void)reuse_on_error(&asked, &control, age - lifetime, age & 1);
	assert(response_obstacle(&q, &r, -1) != NULL ||
	    (!asked.no_store && !control.is_private));
	(void)request_is_met(&q.head, &r);
	(void)request_is_satisfied(&q.head, &r);
	c = work_buffer(WORK_KEY);
	if (variant_of(&q, &r, c)) {
		e.variant = buffer_text(c);
		assert(variant_fits(&e, &r, &q));
	}
}

/* A target has the same key when it is written from its parts. */
static void
fuzz_target(struct text in, enum method method)
{
	struct buffer *b = work_buffer(WORK_HEAD);
	struct target t, u;
	bool six;

	if (target_parse(in, method, &t) != 1 || t.host.len == 0)
		return;
	assert(fuzz_within(t.host, in) && fuzz_within(t.path, in));
	six = text_find(t.host, ':') < t.host.len;
	buffer_print(b, "http://%s%.*s%s:%u%.*s", six ? "[" : "",
	    (int)t.host.len, t.host.at, six ? "]" : "", t.port,
	    (int)t.path.len, t.path.at);
	assert(target_parse(fuzz_built(b), METHOD_GET, &u) == 1 &&
	    key_hash(key_of(&t)) == key_hash(key_of(&u)));
}

/* URLs, parents, references, addresses and networks. */
static void
fuzz_url(struct text in)
{
	static struct target own = { FORM_ABSOLUTE, { "h", 1 }, 80,
		{ "/a/b?c", 6 } }, t;
	static const struct parent none;
	struct parent parent = none;
	char s[FUZZ_MAX + 1];
	struct address a, b;
	struct network n;

	fuzz_target(in, METHOD_GET);
	fuzz_target(in, METHOD_CONNECT);
	if (in.len > 0)
		(void)reference_resolve(&own, in, work_buffer(WORK_VARIANT),
		    &t.path);
	if (url_parse(in, &t))
		assert(fuzz_within(t.host, in) && t.host.len > 0 && t.port > 0);
	if (text_copy(in, s, sizeof(s)) && parent_parse(text_cut(at_guard(0, s,
	    in.len + 1).at, in.len), &parent) == NULL)
		assert(parent.host[0] != '\0' && parent.port > 0);
	if (address_parse(in, 80, &a)) {
		b = address_read(text_of(address_words(&a)));
		assert(address_same(&a, &b));
	}
	assert(!network_parse(in, &n) || network_has(&n, &n.address));
}

/* A range lies in the body, and is the same when it is written in full. */
static void
fuzz_range(struct text in)
{
	static const uint64_t bodies[] = { 0, 1, 10, 1000, INT64_MAX };
	static struct response r = { .status = 200 };
	uint64_t body = bodies[fuzz_draw(COUNT(bodies))];
	struct range range, again;
	char s[60];

	if (range_parse(field_at_guard("Range", in), &r, body, &range) != 1)
		return;
	assert(range.length > 0 && range.first < body &&
	    range.length <= body - range.first);
	(void)snprintf(s, sizeof(s), "bytes=%llu-%llu",
	    (unsigned long long)range.first,
	    (unsigned long long)(range.first + range.length - 1));
	assert(range_parse(field_at_guard("Range", text_of(s)), &r, body,
	    &again) == 1 && again.first == range.first && again.length == range.length);
}

/* The rules in lines, or the users in a file; the caller owns them. */
static struct rules *
fuzz_rules_read(struct text lines, bool users)
{
	static struct parser p;
	struct rules *rules = calloc(1, sizeof(*rules));
	unsigned i;

	p.rules = rules;
	p.guard = NULL;
	rules->refs = 1;
	rules->logins = true;
	for (i = 0; i < GROUPS; i++)
		p.end[i] = &rules->first[i];
	for (i = 1; lines.len > 0; i++) {
		struct text line = text_split(&lines, '\n');
		char *s = malloc(line.len + 1);

		parser_begin(&p, "fuzz", i);
		if (text_copy(line, s, line.len + 1) && !users)
			line_take(&p, "fuzz", i, s);
		else if (users && line_check(&p, text_cut(s, line.len)))
			account_parse(&p, text_cut(s, line.len));
		free(s);
	}
	return rules;
}

/*
 * Rules that are right are so when their texts are read; those that hide a
 * login are left out.
 */
static void
fuzz_rules(struct text in)
{
	static struct rules none;
	struct buffer *b = work_buffer(WORK_HEAD);
	const struct rule *rule;
	struct rules *rules;
	unsigned i, errors;

	rules_now = &none;	/* so that `users' opens plain files only */
	rules = fuzz_rules_read(in, false);
	for (i = 0; i < GROUPS; i++)
		for (rule = rules->first[i]; rule != NULL; rule = rule->next)
			if (strstr(rule->text, "://") == NULL)
				buffer_print(b, "%s\n", rule->text);
	errors = rules->errors;
	rules_give(&rules);
	if (errors > 0)
		return;
	rules = fuzz_rules_read(fuzz_built(b), false);
	assert(rules->errors == 0);
	rules_give(&rules);
}

/* Users who are in the file can log in. */
static void
fuzz_users(struct text in)
{
	struct rules *rules = fuzz_rules_read(in, true);
	char plain[2 * CREDENTIAL_MAX + 2], coded[sizeof(plain) * 2] = "Basic ";
	const struct account *a;

	for (a = rules->accounts; a != NULL; a = a->next) {
		base64_encode(plain, (size_t)snprintf(plain, sizeof(plain),
		    "%.*s:%.*s", (int)a->user.len, a->user.at,
		    (int)a->password.len, a->password.at), coded + 6);
		assert(account_login(rules, field_at_guard(
		    "Proxy-Authorization", text_of(coded))) != NULL);
	}
	rules_give(&rules);
}

/*
 * A name that stands alone on a line is covered, if there are no exceptions.
 * The reader has the file before each pass: there is nothing to read(2).
 */
static void
fuzz_list(struct text in)
{
	static int fd = -1;
	struct list list = { .path = "list" };
	struct text rest = in, line;
	int got;

	fd = fd == -1 ? open("/dev/zero", O_RDONLY) : fd;
	list.fd = fd;
	for (got = list_rewind(&list) ? 0 : -1; got == 0;) {
		if (list_reader.end == 0) {
			memcpy(list_reader.data, in.at, in.len);
			list_reader.end = in.len;
			list_reader.eof = true;
		}
		got = list_step(&list);
	}
	assert((got == -1) == (text_find(in, '\0') < in.len));
	assert(got == -1 || list.used < list.size);
	while (got == 1 && rest.len > 0) {
		line = text_split(&rest, '\n');
		line = at_guard(1, line.at, line.len);
		if (text_find(in, '@') == in.len && domain_is_valid(line))
			assert(list_has(&list, line));
		else
			(void)list_has(&list, line);
	}
	list.fd = -1;
	list_free(&list);
}

/* A greeting has its name as soon as it is whole, and in other records. */
static void
fuzz_hello(struct text in)
{
	char *flat = malloc(HELLO_MAX), *again = malloc(HELLO_MAX);
	char s[FUZZ_MAX * 6 + 6];
	struct text name = hello_name(in, flat), t;
	size_t n = 0, part = fuzz_draw(in.len + 1);

	assert(name.len == 0 || (host_is_valid(name, false) &&
	    text_find(name, '~') == name.len));
	t = at_guard(1, in.at, part);
	assert(!hello_is_whole(t, again) ||
	    text_equals(name, hello_name(t, again)));
	for (t = hello_gather(in, flat); t.len > 0; t = text_from(t, part)) {
		part = fuzz_piece(t.len);
		n += record_put(s + n, t.at, part);
	}
	assert(text_equals(name, hello_name(at_guard(1, s, n), again)));
	free(flat);
	free(again);
}

/* The messages of a SOCKS parent end where they do when more has come. */
static void
fuzz_socks(struct text in)
{
	unsigned g;
	size_t i, n, part;

	for (g = GREETING_METHOD; g <= GREETING_REPLY; g++) {
		n = greet_length((enum greeting)g, in);
		for (i = 0; i < in.len; i++) {
			part = greet_length((enum greeting)g,
			    at_guard(1, in.at, i));
			assert(part > i || part == n);
			if (part <= i)
				break;
		}
		if (n == 0 || n > in.len)
			return;
		(void)greet_words((unsigned char)in.at[1]);
		in = text_from(in, n);
	}
}

/*
 * The region of an entry, with its first line set right: it is the same when
 * built anew, and no region with a bit changed.
 */
static void
fuzz_entry(struct text in)
{
	static char s[REGION_LINE + FUZZ_MAX + 1];
	struct buffer *b = work_buffer(WORK_REGION);
	struct entry e, f;
	struct text t;
	size_t n = REGION_LINE + in.len;

	(void)entry_parse(in, &e);
	region_line(s, in, 12345);
	memcpy(s + REGION_LINE, in.at, in.len);
	t = at_guard(0, s, n);
	if (!entry_parse(t, &e))
		return;
	s[fuzz_draw(n)] ^= (char)(1 << fuzz_draw(8));
	assert(!entry_parse(at_guard(1, s, n), &f));
	if (e.vary.at != NULL)
		return;
	assert(fuzz_within(e.head, t) && fuzz_within(e.server, t));
	assert(region_build(b, &e, e.head, 0) &&
	    entry_parse(fuzz_built(b), &f) && f.region == buffer_len(b) &&
	    f.body == e.body && f.requested == e.requested &&
	    f.responded == e.responded && f.age == e.age &&
	    f.counted == e.counted && text_equals(f.key, e.key) &&
	    text_equals(f.variant, e.variant) && text_equals(f.head, e.head));
}

/* Bytes come back, in the least room for them; other room is not overrun. */
static void
fuzz_base64(struct text in)
{
	size_t size = in.len + 2, n, m;
	char *coded = malloc(4 * size / 3 + 1), *to = malloc(size);
	char *small = malloc(m = fuzz_draw(size));

	base64_encode(in.at, in.len, coded);
	assert(base64_decode(text_of(coded), to, size, &n) && n == in.len &&
	    text_equals(text_cut(to, n), in));
	(void)base64_decode(in, small, m, &n);
	free(coded);
	free(to);
	free(small);
}

/*
 * The entries.  Seeds are the inputs of the rows of these kinds, see fuzz_rows,
 * and those given here as in a row.
 */
static const struct fuzz_entry {
	const char *name;
	void (*run)(struct text in);
	const char *kinds, *seeds;
} fuzz_entries[] = {
	{ "request", fuzz_request, " request ",
	    "CONNECT a:1 HTTP/1.1\r\nHost: a\r\nConnection: x, y\r\n"
	    "Via: 1.1 b (c), d\r\nMax-Forwards: 1\r\n\r\n | "
	    "GET http://u:p@a/b?c#d HTTP/1.1\r\nHost: [::1]:8\r\n\r\n" },
	{ "response", fuzz_response, " response ", "" },
	{ "chunks", fuzz_chunks, " body ", "" },
	{ "date", fuzz_date, " date ", "" },
	{ "freshness", fuzz_freshness, " lifetime age variant met satisfied ",
	    "Cache-Control: max-age=9, s-maxage=8\r\nVary: A, B\r\nAge: 1 > "
	    "Cache-Control: max-stale=5, min-fresh=1\r\nA: b\r\nB: c | "
	    "Cache-Control: no-store, private, stale-if-error=9 > "
	    "Pragma: no-cache" },
	{ "url", fuzz_url, " target network address ",
	    "https://u:p@a:1/b?c | socks5://u:p@[::1]:1/ | ../b | //a/c#d" },
	{ "range", fuzz_range, " range ", "" },
	{ "rules", fuzz_rules, " line ",
	    "allow\nguard\nusers a\ndeny url a not user *\n" },
	{ "list", fuzz_list, " domains ", "" },
	{ "hello", fuzz_hello, "", "\x16\3\1\\0\x3b\1\\0\\0\x37\3\3\\{32:r}"
	    "\\0\\0\2\x13\1\1\\0\\0\x0c\\0\\0\\0\10\\0\6\\0\\0\3a.b" },
	{ "socks", fuzz_socks, "", "\5\2\1\\0\5\\0\\0\1\\{6:a} | "
	    "\5\\0\1\\0\5\\0\\0\3\1a12 | \5\\0\1\5\5" },
	{ "entry", fuzz_entry, "", "key: http://h:80/\nvary: a\ntoken: b\n | "
	    "key: http://h:80/\nvariant: a=1:b,;\nrequested: 1\nresponded: 2"
	    "\nage: 0\nserver: 127.0.0.1:80\ncounted: yes\npad: ..\n\n"
	    "HTTP/1.1 200 OK\r\nA: b\r\n\r\n" },
	{ "base64", fuzz_base64, " base64 ", "Zm9v | Zg== | Zm8=" },
	/* The slowest is last: it gets the time that the others leave. */
	{ "users", fuzz_users, "", "alice:secret\n# x\nb:c:d\r\n | a:$1$b" },
	{ NULL, NULL, NULL, NULL }
};

static const struct fuzz_entry *fuzz_now = fuzz_entries;
static struct text fuzz_seeds[4096];
static size_t fuzz_seeds_n;

/* Takes the inputs of a row, without its kind, as seeds, each a file, too. */
static void
fuzz_seed(const char *s)
{
	static char bytes[ROW_MAX];
	const char *end = strchr(s, '\0'), *p, *stop;

	for (p = strstr(s, " = "); p != NULL; p = strstr(p + 1, " = "))
		end = p;
	for (; s <= end && fuzz_seeds_n < COUNT(fuzz_seeds); s = stop + 3) {
		char path[40], *copy;
		size_t n;
		int fd;

		p = strstr(s, " | ");
		stop = p != NULL && p < end ? p : end;
		n = unescape(s, stop, bytes);
		n = n < FUZZ_MAX ? n : FUZZ_MAX;
		copy = memcpy(malloc(n + 1), bytes, n);
		(void)snprintf(path, sizeof(path), "seeds/%d",
		    (int)fuzz_seeds_n);
		fuzz_seeds[fuzz_seeds_n++] = text_cut(copy, n);
		fd = open(path, O_WRONLY | O_CREAT, 0600);
		if (fd_write(fd, copy, n) != (ssize_t)n)
			die("%s: %s", path, strerror(errno));
		(void)close(fd);
	}
}

/* Finds the entry that the environment names, and its seeds. */
int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	static char line[ROW_MAX];
	const char *name = getenv("FUZZ_ENTRY");
	FILE *rows = fopen("rows", "r");
	char kind[40];

	clock_read();
	now.wall = 1795315380;
	while (strcmp(fuzz_now->name, name) != 0)
		fuzz_now++;
	fuzz_seed(fuzz_now->seeds);
	while (fgets(line, sizeof(line), rows) != NULL) {
		line[strcspn(line, "\n")] = '\0';
		(void)snprintf(kind, sizeof(kind), " %.*s ",
		    (int)strcspn(line, ": "), line);
		if (strchr(line, ' ') && strstr(fuzz_now->kinds, kind))
			fuzz_seed(strchr(line, ' ') + 1);
	}
	return fclose(rows);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	struct text in = text_cut((const char *)data, n);

	fuzz_dice = hash_text(n, in);
	fuzz_now->run(in);
	return 0;
}

#ifdef FUZZ_PLAIN
/* One input: a seed in which some bytes were replaced. */
static size_t
fuzz_mutate(char *s)
{
	static const char marks[] = "\r\n \t\0:;,=\"/%-[]@#*.09aA\x7f\xff";
	struct text seed = fuzz_seeds[fuzz_draw(fuzz_seeds_n)], piece;
	size_t n = seed.len, turns = fuzz_piece(8), at, gone;
	char byte;

	memcpy(s, seed.at, n);
	for (; turns > 0; turns--) {
		byte = (char)fuzz_draw(256);
		piece = fuzz_seeds[fuzz_draw(fuzz_seeds_n)];
		piece = text_from(piece, fuzz_draw(piece.len + 1));
		piece.len = fuzz_draw(piece.len + 1);
		if (fuzz_draw(3) > 0)
			piece = text_cut(fuzz_draw(2) ? &byte :
			    marks + fuzz_draw(sizeof(marks) - 1), 1);
		at = fuzz_draw(n + 1);
		gone = fuzz_draw(3) ? piece.len : fuzz_draw(n - at + 1);
		gone = gone < n - at ? gone : n - at;
		if (n - gone + piece.len > FUZZ_MAX)
			continue;
		memmove(s + at + piece.len, s + at + gone, n - at - gone);
		memcpy(s + at, piece.at, piece.len);
		n += piece.len - gone;
	}
	return n;
}

/* Has libFuzzer's first three options, and leaves what fails in the file. */
int
main(int argc, char **argv)
{
	int64_t runs = strtol(strchr(argv[1], '=') + 1, NULL, 10), i;
	int64_t us = strtol(strchr(argv[2], '=') + 1, NULL, 10) * 1000000;
	const char *path = strchr(argv[3], '=') + 1;
	int fd = open(path, O_WRONLY | O_CREAT, 0600);
	uint64_t dice = (uint64_t)clock_us();
	char bytes[FUZZ_MAX];

	(void)LLVMFuzzerInitialize(&argc, &argv);
	for (i = 0; i < runs && clock_us() < now.us + us; i++) {
		struct text in;

		fuzz_dice = dice += 1000;
		in = at_guard(2, bytes, fuzz_mutate(bytes));
		if (pwrite(fd, in.at, in.len, 0) == -1 ||
		    ftruncate(fd, (off_t)in.len) == -1)
			die("%s: %s", path, strerror(errno));
		(void)alarm(60);
		(void)LLVMFuzzerTestOneInput((const uint8_t *)in.at, in.len);
	}
	(void)remove(path);
	printf("stat::number_of_executed_units: %lld\n", (long long)i);
	return 0;
}
#endif
EOF_FUZZ
}

# Builds it with libFuzzer, else with sanitizers, else without.
fuzz_build() {
	write_fuzz > fuzz.c
	checks='address,undefined -fno-sanitize-recover=all'
	for flags in "-fsanitize=fuzzer,$checks" \
	    "-fsanitize=$checks -DFUZZ_PLAIN" -DFUZZ_PLAIN; do
		for cc in ${CC:-clang cc}; do
			# shellcheck disable=SC2086 # flags are words
			$cc -g -O1 $flags "-I$here" "-I$work" -o fuzz fuzz.c \
			    > build.log 2>&1 && return
		done
	done
	return 1
}

# The rows of unit tests, and lines of rules as rows of the kind "line".
fuzz_rows() (
	# shellcheck disable=SC2317 # the tests call them
	unit() { cat; }
	# shellcheck disable=SC2317
	rows() { cat; }
	sed -n 's/^\(test_[a-z0-9_]*\)() {.*/\1/p' "$self" |
	    grep -E 'unit_|match_|list_formats' | while read -r fuzz_test; do
		"$fuzz_test" < /dev/null
	done
	{ right_lines; wrong_lines; } | sed -e 's/\\/\\\\/g' -e 's/^/line /'
)

# One entry, for so many seconds: sets $fuzz_says.  The file gets an input that
# fails: fuzz_entry ENTRY SECONDS FILE
fuzz_entry() {
	rm -rf seeds
	mkdir seeds
	fuzz_ms=$("$peer" clock)
	FUZZ_ENTRY=$1 ./fuzz "-runs=${RUNS:-1000000}" "-max_total_time=$2" \
	    "-exact_artifact_path=$3" -max_len=2048 -timeout=60 \
	    -print_final_stats=1 seeds > log 2>&1
	fuzz_status=$?
	fuzz_s=$((($("$peer" clock) - fuzz_ms + 500) / 1000))
	fuzz_says=$(sed -n 's/^stat::number_of_executed_units: *//p' log)
	fuzz_says="$fuzz_says runs in $fuzz_s s"
	[ $fuzz_status != 0 ] || return 0
	fuzz_says="status $fuzz_status, $(grep -E \
	    'ssertion|runtime error: |SUMMARY: ' log | head -n 1)"
	[ ! -f "$3" ] || fuzz_says="$fuzz_says; input in $3:
#   $(od -A n -v -t x1 "$3" | tr -d '\n' | sed 's/ /\\x/g')"
	return 1
}

# Fuzzes the parsers, each with $RUNS inputs at most: fuzz SECONDS [ENTRY...]
fuzz() (
	mkdir "$work/fuzz" && cd "$work/fuzz" || exit 1
	seconds=${1-}
	case $seconds in
	'' | *[!0-9]*)
		echo "usage: test.sh fuzz SECONDS [entry ...]" >&2
		exit 2
		;;
	esac
	shift
	if ! fuzz_build; then
		echo "not ok 1 - fuzz: cc: $(head -n 1 build.log)"
		echo "0 passed, 1 failed, 0 skipped"
		exit 1
	fi
	fuzz_rows > rows
	all=$(sed -n 's/^	{ "\([a-z0-9]*\)", fuzz_.*/\1/p' fuzz.c)
	# shellcheck disable=SC2086 # names are words
	[ $# -gt 0 ] || set -- $all
	found=$(mktemp -d "${TMPDIR:-/tmp}/proxy-fuzz.XXXXXX") || exit 1
	number=0 failed=0 ends=$(($("$peer" clock) + seconds * 1000))
	for entry; do
		# What one entry does not need is for the others.
		share=$(((ends - $("$peer" clock)) / ($# - number) / 1000))
		[ $share -gt 0 ] || share=1
		number=$((number + 1))
		fuzz_says="no such entry"
		if echo "$all" | grep -x "$entry" > /dev/null &&
		    fuzz_entry "$entry" $share "$found/$entry"; then
			echo "ok $number - fuzz $entry: $fuzz_says"
		else
			failed=$((failed + 1))
			echo "not ok $number - fuzz $entry: $fuzz_says"
		fi
	done
	rmdir "$found" 2> /dev/null
	echo "$((number - failed)) passed, $failed failed, 0 skipped"
	[ $failed = 0 ]
)

# ---- 35. Faults and soak ----------------------------------------------------

# System calls that fail, test.sh faults, and clients of all kinds for a long
# time, test.sh soak.  Both are one C program: client, origin and judge.  The
# proxy is built with each call behind a function of ours, and shares a page of
# memory with that program: there stands which call is to fail, and what the
# proxy holds.  A scenario is a row of scenarios[]; a call is a row of trials[],
# a name in CALLS and in faults_calls, and a FAULT.
#
# Each use of a call, the first to the n-th, fails once in each scenario and
# with each error; then, for errors that last, it and all uses that follow fail.
# A failure is one line: the call, the error, which use, the scenario, and why.
faults_calls='read write pwrite open close accept socket connect pipe rename
fstat stat lstat statvfs unlink mkdir malloc calloc regcomp setsockopt
getsockopt getsockname lseek futimens waitpid poll'

write_faults() {
	for faults_call in $faults_calls; do
		case $faults_call in
		open) faults_more=', 0, 0' ;;
		*) faults_more= ;;
		esac
		echo "#define $faults_call(...)" \
		    "fault_$faults_call(__VA_ARGS__$faults_more)"
	done > faults.h
	cat >> faults.h <<'EOF_FAULTS'
#define fork() fault_fork()
#define fcntl(...) FCNTL(__VA_ARGS__, 0, 0)
#define FCNTL(fd, what, how, ...) fault_fcntl(fd, what, (intptr_t)(how))
EOF_FAULTS
	cat > faults.c <<'EOF_FAULTS'
/*
 * Two programs with one page of memory in common.  The proxy is names.c, and
 * so proxy.c, with system calls of which the driver makes one fail; its page
 * says what it holds.  With -DDRIVER, the driver: client, origin and judge.
 */
#define _XOPEN_SOURCE 700
#define _DEFAULT_SOURCE 1
#define _DARWIN_C_SOURCE 1
#define __BSD_VISIBLE 1
#define _FILE_OFFSET_BITS 64
#define _TIME_BITS 64
#ifdef __TINYC__
#define _REGEX_NELTS(n)	/* as in proxy.c */
#endif
#include <sys/types.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <regex.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

#define COUNT(table) (sizeof(table) / sizeof((table)[0]))

/* Calls by their names. */
#define CALLS(X) X(read) X(write) X(pwrite) X(open) X(close) X(accept) \
	X(socket) X(connect) X(pipe) X(fork) X(rename) X(fcntl) X(fstat) \
	X(stat) X(unlink) X(mkdir) X(poll) X(malloc) X(calloc) X(regcomp) \
	X(setsockopt) X(getsockopt) X(getsockname) X(lseek) \
	X(futimens) X(statvfs) X(lstat)
#define CALL_ENUM(name) CALL_##name,
enum call { CALLS(CALL_ENUM) CALL_NONE };

enum { SHORT = -1 };	/* an "error": one byte is moved */

struct fault_page {
	/* The driver's order: this call fails at its n-th use. */
	volatile int call, error;
	volatile long n;
	volatile int ever;	/* and at all that follow */
	volatile int children_too;	/* also in its children */
	volatile long count;	/* uses so far */
	volatile int fired, badfd;
	volatile int cut;	/* the fault ended the client's connection */
	volatile long turns;	/* of the loop; with it is what follows */
	volatile int port, sanitized, helper;
	volatile int busy;	/* what is not 0 if nothing goes on */
	/* What must be again as it was. */
	volatile int fds, kept, children, buffers, fetches, sweeping;
	volatile long making;
};

#ifndef DRIVER

static struct fault_page *page;
static pid_t fault_main;
static int fault_fds, fault_children;

/* The error for this use of a call with fd (or -1): 0 is none. */
static int
fault(int call, int fd)
{
	int error = page->error, saved = errno;
	struct pollfd hangup = { fd, 0, 0 };
	struct sockaddr_in in;
	socklen_t len = sizeof(in);
	struct stat s;

	if (page->call != call ||
	    (getpid() != fault_main && !page->children_too))
		return 0;
	if (fd != -1) {
		if (fstat(fd, &s) == -1 || (error == SHORT ?
		    S_ISFIFO(s.st_mode) : error == ENOSPC || error == EIO ?
		    !S_ISREG(s.st_mode) : (error == EAGAIN ||
		    error == ECONNRESET || error == ENOBUFS) &&
		    !S_ISSOCK(s.st_mode)))
			return 0;
		/* Behind a hangup there is always something to read. */
		if (error == EAGAIN && poll(&hangup, 1, 0) == 1 &&
		    hangup.revents & (POLLHUP | POLLERR))
			return 0;
	}
	errno = saved;
	if (++page->count < page->n || (page->fired && !page->ever))
		return 0;
	page->fired = 1;
	if (error == ECONNRESET) {
		/* Nothing can be read from it or written to it any more. */
		(void)getsockname(fd, (struct sockaddr *)&in, &len);
		page->cut = ntohs(in.sin_port) == page->port;
		(void)shutdown(fd, SHUT_RDWR);
	}
	return error;
}

#define FAULT(type, bad, name, parameters, fd, arguments, then) \
static type \
fault_##name parameters \
{ \
	int error = fault(CALL_##name, fd); \
	type got; \
	if (error != 0) \
		return errno = error, bad; \
	got = name arguments; \
	then; \
	return got; \
}
#define FAULT_MOVE(name, parameters, arguments) \
static ssize_t \
fault_##name parameters \
{ \
	int error = fault(CALL_##name, fd); \
	if (error > 0) \
		return errno = error, -1; \
	n = error == SHORT && n > 1 ? 1 : n; \
	return name arguments; \
}
#define FD_MADE if (got != -1) fault_fds++

FAULT_MOVE(read, (int fd, void *at, size_t n), (fd, at, n))
FAULT_MOVE(write, (int fd, const void *at, size_t n), (fd, at, n))
FAULT_MOVE(pwrite, (int fd, const void *at, size_t n, off_t to),
    (fd, at, n, to))
FAULT(int, -1, open, (const char *path, int flags, int mode, ...), -1,
    (path, flags, mode), FD_MADE)
FAULT(int, -1, accept, (int fd, struct sockaddr *at, socklen_t *n), fd,
    (fd, at, n), FD_MADE)
FAULT(int, -1, socket, (int family, int type, int protocol), -1,
    (family, type, protocol), FD_MADE)
FAULT(int, -1, pipe, (int *fds), -1, (fds), if (got != -1) fault_fds += 2)
FAULT(pid_t, -1, fork, (void), -1, (), if (got > 0) fault_children++)
FAULT(int, -1, rename, (const char *from, const char *to), -1, (from, to), )
/* A pointer for F_SETLK: C libraries read as much in any case. */
FAULT(int, -1, fcntl, (int fd, int what, intptr_t how), -1,
    (fd, what, how), if (what == F_DUPFD && got != -1) fault_fds++)
FAULT(int, -1, fstat, (int fd, struct stat *s), -1, (fd, s), )
FAULT(int, -1, stat, (const char *path, struct stat *s), -1, (path, s), )
FAULT(int, -1, lstat, (const char *path, struct stat *s), -1, (path, s), )
FAULT(int, -1, statvfs, (const char *path, struct statvfs *s), -1,
    (path, s), )
FAULT(int, -1, unlink, (const char *path), -1, (path), )
FAULT(int, -1, mkdir, (const char *path, mode_t mode), -1, (path, mode), )
FAULT(void *, NULL, malloc, (size_t n), -1, (n), )
FAULT(void *, NULL, calloc, (size_t n, size_t size), -1, (n, size), )
FAULT(int, REG_ESPACE, regcomp, (regex_t *r, const char *s, int how), -1,
    (r, s, how), )
FAULT(int, -1, setsockopt, (int fd, int level, int what, const void *at,
    socklen_t n), -1, (fd, level, what, at, n), )
FAULT(int, -1, getsockopt, (int fd, int level, int what, void *at,
    socklen_t *n), -1, (fd, level, what, at, n), )
FAULT(int, -1, getsockname, (int fd, struct sockaddr *at, socklen_t *n), -1,
    (fd, at, n), )
FAULT(off_t, -1, lseek, (int fd, off_t to, int from), -1, (fd, to, from), )
FAULT(int, -1, futimens, (int fd, const struct timespec *times), -1,
    (fd, times), )

/* An interrupted connect(2) goes on; so does close(2) on most systems. */
static int
fault_connect(int fd, const struct sockaddr *at, socklen_t n)
{
	int error = fault(CALL_connect, -1), got = -1;

	if (error == 0 || error == EINTR)
		got = connect(fd, at, n);
	return error == 0 ? got : (errno = error, -1);
}

static int
fault_close(int fd)
{
	int error = fault(CALL_close, -1), got = close(fd);

	if (got != -1)
		fault_fds--;
	else if (getpid() == fault_main)
		page->badfd++;
	return error == 0 ? got : (errno = error, -1);
}

static pid_t
fault_waitpid(pid_t pid, int *status, int how)
{
	pid_t got = waitpid(pid, status, how);

	if (got > 0)
		fault_children--;
	return got;
}

static void fault_tell(const struct pollfd *);

static int
fault_poll(struct pollfd *fds, nfds_t n, int ms)
{
	int error;

	fault_tell(fds);
	error = fault(CALL_poll, -1);
	return error == 0 ? poll(fds, n, ms) : (errno = error, -1);
}

#include "faults.h"
#define main proxy_main
#include "names.c"
#undef main
#undef open
#undef close

/* At each turn of the loop: what does the proxy hold? */
static void
fault_tell(const struct pollfd *fds)
{
	const struct fetch *f;
	const struct other *o;
	int tries = 0, asked = 0, i;

	if (fds != poll_set.fds || getpid() != fault_main)
		return;
	for (page->fetches = 0, f = fetches; f != NULL; f = f->next)
		page->fetches++;
	for (page->kept = 0, o = others; o < others + others_used; o++) {
		page->kept += o->conn.fd != -1 && o->conn.role == ROLE_KEPT;
		tries += o->conn.fd != -1 && o->conn.role != ROLE_KEPT;
	}
	for (i = 0; i < NAMES_MAX; i++)
		asked += names.table[i].state == NAME_WANTED ||
		    names.table[i].state == NAME_ASKED;
	page->port = listeners[0].address.port;
	page->helper = names.questions.fd == -1 ? 0 : (int)names.helper;
	page->busy = (int)exchanges.busy + tries + asked + rules_unread +
	    reloading + (store.sweeper > 0) + (exchanges.again != NULL) +
	    (names.questions.fd == -1) + (buffer_len(&log_lines) > 0);
	page->fds = fault_fds - page->kept;
	page->children = fault_children;
	page->buffers = (int)buffer_pool.used;
	page->sweeping = store.sweeper > 0;
	page->making = (long)stock->making[worker];
	page->turns++;
}

int
main(int argc, char **argv)
{
	int fd = open(getenv("FAULT_PAGE"), O_RDWR);

	page = mmap(NULL, sizeof(*page), PROT_READ | PROT_WRITE, MAP_SHARED,
	    fd, 0);
	if (page == MAP_FAILED)
		return 99;
	close(fd);
	fault_main = getpid();
#if defined(__SANITIZE_ADDRESS__)
	page->sanitized = 1;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
	page->sanitized = 1;
#endif
#endif
	return proxy_main(argc, argv);
}

#else

#define main peer_main
#include "peer.c"
#undef main

enum { LINKS = 400, DEEP = 20000, ECHO_END = 1, ORIGIN, CLIENT };
enum framing { NO_BODY, LENGTH, CHUNKED, CLOSES, RAW };

/* Bytes that are a function of id and place, to be sent or to be judged. */
struct body {
	enum framing framing;
	unsigned id;
	size_t size, at;	/* all; sent or come so far */
};

/*
 * One end of a connection: the proxy's client, its origin, or an echo for
 * tunnels.  What it sends is `out', then the body; what comes is a head, then
 * a body, whose bytes must be those of expected.id.
 */
struct link {
	int role, fd;
	char out[DEEP];
	size_t out_n, out_at;
	struct body body;
	size_t dies;		/* breaks after so many bytes of the body */
	int resets;		/* with a reset */
	size_t step;		/* bytes moved at a time; 0: no limit */
	long gap, next;		/* ms between steps; the next one */
	int shuts, shut;	/* half-closes when all is sent; has */
	int last;		/* the origin closes after this answer */
	char head[8192];
	size_t head_n;
	int headed, status;
	struct body expected;
	size_t left;		/* of the body or chunk */
	int chunk;	/* 0 size, 1 its line, 2 data, 3 CRLF, 4 end */
	int blank;		/* of the trailer section: an empty line */
	int judged;		/* the bytes are to be compared */
	int whole, wrong;	/* it says it is whole; it has other bytes */
	int eof, broken;	/* the end of the stream; an error */
	int reset;		/* what it sends arrives no more */
	int quits;		/* soak: when it goes away */
	int deserves;		/* soak: the answer must be right */
	long until;		/* soak: and over then */
	char asks[200];		/* soak: what it asked for */
	int rest;		/* soak: requests to come over it */
};

static struct fault_page *page;
static struct link links[LINKS];
static int listeners[2];	/* origin, echo */
static int ports[2];
static char why_origin[200];	/* what an origin saw that must not be */
static pid_t proxy_pid;
static char **proxy_argv;
static unsigned ids = 1;
static uint64_t dice = 88172645463325252u;

static unsigned
chance(unsigned n)
{
	dice ^= dice << 13;
	dice ^= dice >> 7;
	dice ^= dice << 17;
	return (unsigned)(dice >> 11) % n;
}

static char
byte_of(unsigned id, size_t at)
{
	return (char)(at ^ at >> 8 ^ at >> 16 ^ id * 37);
}

/* Closes a link; with a reset, no port stays in TIME_WAIT. */
static void
link_close(struct link *l, int reset)
{
	struct linger linger = { 1, 0 };

	if (l->fd != -1 && l->role != 0) {
		if (reset)
			setsockopt(l->fd, SOL_SOCKET, SO_LINGER, &linger,
			    sizeof(linger));
		close(l->fd);
	}
	l->role = 0;
	l->fd = -1;
}

static struct link *
link_new(int role, int fd)
{
	struct link *l = links;
	int on = 1;

	while (l < links + LINKS && l->role != 0)
		l++;
	if (l == links + LINKS || fd == -1) {
		close(fd);
		return NULL;
	}
	memset(l, 0, sizeof(*l));
	l->role = role;
	l->fd = fd;
	l->dies = l->expected.size = (size_t)-1;
	fcntl(fd, F_SETFL, O_NONBLOCK);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	return l;
}

/* The next message begins, in both directions. */
static void
link_again(struct link *l)
{
	l->head_n = l->out_n = l->out_at = l->expected.at = 0;
	l->headed = l->status = l->whole = l->judged = 0;
	l->body.framing = NO_BODY;
	l->body.at = 0;
}

/* The value of a field, as a string up to its line's end; or NULL. */
static const char *
link_field(const struct link *l, const char *name)
{
	const char *at = l->head;
	size_t n = strlen(name);

	for (; (at = strstr(at, "\r\n")) != NULL; at++)
		if (strncasecmp(at += 2, name, n) == 0 && at[n] == ':')
			return at + n + 1 + strspn(at + n + 1, " ");
	return NULL;
}

static int
link_is(const struct link *l, const char *name, const char *value)
{
	const char *at = link_field(l, name);

	return at != NULL && strncasecmp(at, value, strlen(value)) == 0;
}

/* A head has come: how is its body framed? */
static void
link_head(struct link *l)
{
	const char *length = link_field(l, "Content-Length");

	l->headed = 1;
	l->left = 0;
	l->chunk = 0;
	if (l->role == CLIENT)
		l->status = atoi(l->head + 9);
	if (link_is(l, "Transfer-Encoding", "chunked"))
		l->expected.framing = CHUNKED;
	else if (length != NULL) {
		l->expected.framing = LENGTH;
		l->left = strtoul(length, NULL, 10);
	} else
		l->expected.framing = l->role == CLIENT ? CLOSES : NO_BODY;
	if (l->status == 304 || l->status == 204)
		l->expected.framing = NO_BODY;
	if (l->role == CLIENT && l->body.framing == RAW && l->status == 200)
		l->expected.framing = RAW;
	else if (l->body.framing == RAW)
		l->body.framing = NO_BODY;
	l->whole = l->expected.framing == NO_BODY ||
	    (l->expected.framing == LENGTH && l->left == 0);
}

/* Judges payload. */
static void
link_payload(struct link *l, const char *at, size_t n)
{
	for (; n > 0; n--, at++, l->expected.at++)
		if (l->judged && (l->expected.at >= l->expected.size ||
		    *at != byte_of(l->expected.id, l->expected.at)))
			l->wrong = 1;
}

/* Takes the framing off; returns how many bytes of it, or of payload. */
static size_t
link_chunks(struct link *l, const char *at, size_t n)
{
	size_t piece = n < l->left ? n : l->left;
	char c = *at;

	if (l->chunk == 2) {
		link_payload(l, at, piece);
		l->left -= piece;
		if (l->left == 0)
			l->chunk = 3;
		return piece;
	}
	if (l->chunk == 0 && c != '\r')
		l->left = l->left * 16 + (size_t)(c <= '9' ? c - '0' :
		    (c | 32) - 'a' + 10);
	else if (l->chunk == 0)
		l->chunk = 1;
	else if (l->chunk == 1) {
		l->chunk = l->left > 0 ? 2 : 4;
		l->blank = 1;
	} else if (l->chunk == 3 && c == '\n')
		l->chunk = 0;
	else if (l->chunk == 4 && c == '\n') {
		l->whole = l->blank;
		l->blank = 1;
	} else if (l->chunk == 4 && c != '\r')
		l->blank = 0;
	return 1;
}

static void origin_answer(struct link *l);

/* Takes bytes that came. */
static void
link_take(struct link *l, const char *at, size_t n)
{
	size_t used;

	for (; n > 0; at += used, n -= used) {
		used = n;
		if (!l->headed) {
			used = 1;
			if (l->head_n == sizeof(l->head) - 1)
				l->wrong = 1;
			else
				l->head[l->head_n++] = *at;
			l->head[l->head_n] = '\0';
			if (l->head_n < 4 || memcmp(l->head + l->head_n - 4,
			    "\r\n\r\n", 4) != 0)
				continue;
			if (l->role == CLIENT && memcmp(l->head,
			    "HTTP/1.1 1", 10) == 0) {
				l->head_n = 0;
				continue;
			}
			link_head(l);
			if (l->status == 200)
				l->expected.at = 0;
			if (l->role == CLIENT && l->status / 100 != 2)
				l->judged = 0;
		} else if (l->whole)
			l->wrong = 1;
		else if (l->expected.framing == CHUNKED)
			used = link_chunks(l, at, n);
		else {
			if (l->expected.framing == LENGTH && used > l->left)
				used = l->left;
			link_payload(l, at, used);
			l->left -= used;
			l->whole = l->expected.framing == LENGTH &&
			    l->left == 0;
		}
		if (l->role == ORIGIN && l->headed)
			origin_answer(l);
	}
}

/* The next piece of the body is due: in a tunnel not before the 200. */
static int
link_fills(const struct link *l)
{
	return l->out_at == l->out_n && l->body.framing != NO_BODY &&
	    (l->body.framing != RAW || l->headed);
}

/* Puts the next piece of the body into `out', with framing. */
static void
link_fill(struct link *l)
{
	struct body *b = &l->body;
	size_t n = b->size - b->at, i;

	if (!link_fills(l))
		return;
	l->out_n = l->out_at = 0;
	if (b->at >= l->dies) {
		link_close(l, l->resets);
		return;
	}
	n = n > DEEP - 100 ? DEEP - 100 : n;
	n = n > l->dies - b->at ? l->dies - b->at : n;
	if (b->framing == CHUNKED)
		l->out_n = (size_t)sprintf(l->out, "%zx\r\n", n);
	for (i = 0; i < n; i++)
		l->out[l->out_n++] = byte_of(b->id, b->at++);
	if (b->framing == CHUNKED && n > 0)
		l->out_n += (size_t)sprintf(l->out + l->out_n, "\r\n");
	if (b->at < b->size)
		return;
	if (b->framing == CHUNKED)
		l->out_n += (size_t)sprintf(l->out + l->out_n, "%s\r\n",
		    n > 0 ? "0\r\n" : "");
	l->shuts = l->shuts || b->framing == CLOSES;
	b->framing = NO_BODY;
}

/* Sends what it can. */
static void
link_write(struct link *l)
{
	size_t n;
	ssize_t put;

	for (link_fill(l); l->role && l->out_at < l->out_n; link_fill(l)) {
		n = l->out_n - l->out_at;
		if (l->step > 0 && n > l->step)
			n = l->step;
		put = send(l->fd, l->out + l->out_at, n, MSG_NOSIGNAL);
		if (put == -1) {
			if (errno == EAGAIN)
				return;
			/* There may be an answer nevertheless. */
			l->reset = 1;
			l->out_at = l->out_n;
			l->body.framing = NO_BODY;
			break;
		}
		l->out_at += (size_t)put;
		if (l->step > 0)
			break;
	}
	if (l->role && l->shuts && !l->shut && l->out_at == l->out_n &&
	    l->body.framing == NO_BODY) {
		l->shut = 1;
		shutdown(l->fd, SHUT_WR);
	}
}

/* Reads what there is, at most 64 KiB. */
static void
link_read(struct link *l)
{
	static char bytes[65536];
	size_t room = sizeof(bytes);
	ssize_t n;

	if (l->role == ECHO_END)
		room = l->out_at < l->out_n ? 0 : DEEP;
	else if (l->step > 0)
		room = l->step;
	if (room == 0)
		return;
	n = recv(l->fd, bytes, room, 0);
	if (n == -1 && errno == EAGAIN)
		return;
	l->eof = l->eof || n == 0;
	l->broken = l->broken || n == -1;
	if (n <= 0) {
		if (l->role == ECHO_END && n == 0)
			l->shuts = 1;
		else if (l->role != CLIENT)
			link_close(l, 0);
		return;
	}
	if (l->role == ECHO_END) {
		memcpy(l->out, bytes, (size_t)n);
		l->out_n = (size_t)n;
		l->out_at = 0;
	} else
		link_take(l, bytes, (size_t)n);
}

/* The path that makes the origin answer so: see origin_answer(). */
static const char *
path_of(const char *kind, unsigned id, size_t size)
{
	static char path[80];

	sprintf(path, "/%s-%u-%zu", kind, id, size);
	return path;
}

/*
 * A request's head, or more, has come.  The kind in /KIND-ID-SIZE has three
 * letters: the framing (length, chunked, end; y: length and Vary), the cache
 * (fresh, validate, no), and the end (w: whole; x: a FIN, r: a reset half way).
 * A request's body has the same bytes as the answer's.
 */
static void
origin_answer(struct link *l)
{
	char kind[8], *slash = strchr(l->head, '/');
	struct body *b = &l->expected;

	if (slash == NULL || sscanf(slash, "/%3[a-z]-%u-%zu", kind, &b->id,
	    &b->size) != 3) {
		snprintf(why_origin, sizeof(why_origin), "the origin got %.60s",
		    l->head);
		link_close(l, 1);
		return;
	}
	l->judged = 1;
	if (l->wrong || (l->whole && b->framing != NO_BODY &&
	    b->at != b->size)) {
		snprintf(why_origin, sizeof(why_origin), "the origin got %s "
		    "body: %zu of %zu bytes", l->wrong ? "a wrong" :
		    "a falsely whole", b->at, b->size);
		link_close(l, 1);
		return;
	}
	if (!l->whole)
		return;
	l->body = *b;
	l->body.at = 0;
	l->body.framing = strchr("ly", kind[0]) ? LENGTH :
	    kind[0] == 'c' ? CHUNKED : CLOSES;
	l->dies = kind[2] == 'w' ? (size_t)-1 : b->size / 2;
	l->resets = kind[2] == 'r';
	if (kind[1] == 'v' && link_field(l, "If-None-Match") != NULL) {
		l->body.framing = NO_BODY;
		l->dies = (size_t)-1;
		l->out_n = (size_t)sprintf(l->out,
		    "HTTP/1.1 304 Not Modified\r\nETag: \"%u\"\r\n", b->id);
	} else
		l->out_n = (size_t)sprintf(l->out, "HTTP/1.1 200 OK\r\n%s",
		    l->body.framing == CHUNKED ?
		    "Transfer-Encoding: chunked\r\n" :
		    l->body.framing == CLOSES ? "Connection: close\r\n" : "");
	if (l->body.framing == LENGTH)
		l->out_n += (size_t)sprintf(l->out + l->out_n,
		    "Content-Length: %zu\r\n", b->size);
	l->out_n += (size_t)sprintf(l->out + l->out_n,
	    "ETag: \"%u\"\r\n%sCache-Control: %s\r\n\r\n", b->id,
	    kind[0] == 'y' ? "Vary: Accept-Language\r\n" : "",
	    kind[1] == 'f' ? "max-age=9999" :
	    kind[1] == 'v' ? "no-cache" : "no-store");
	/* The next request may come when this one is answered. */
	l->headed = 0;
	l->head_n = 0;
	l->whole = l->judged = 0;
	b->at = 0;
	link_write(l);
	if (l->body.framing == NO_BODY && l->out_at == l->out_n)
		l->out_n = l->out_at = 0;
}

/* One look at all links, for at most so many ms. */
static void
turn(int ms)
{
	static struct pollfd fds[LINKS + 2];
	static struct link *whose[LINKS + 2];
	long now = now_ms();
	size_t n = 2, i;
	struct link *l;

	for (i = 0; i < 2; i++)
		fds[i] = (struct pollfd){ listeners[i], POLLIN, 0 };
	for (l = links; l < links + LINKS; l++) {
		if (l->role == 0 || (l->role == CLIENT &&
		    (l->eof || l->broken)))
			continue;
		if (l->gap > 0 && l->next > now) {
			if (ms > l->next - now)
				ms = (int)(l->next - now);
			continue;
		}
		l->next = now + l->gap;
		whose[n] = l;
		fds[n] = (struct pollfd){ l->fd, 0, 0 };
		if (!l->eof && (l->role != ECHO_END || l->out_at == l->out_n))
			fds[n].events = POLLIN;
		if (l->out_at < l->out_n || link_fills(l))
			fds[n].events |= POLLOUT;
		n++;
	}
	if (poll(fds, n, ms) <= 0)
		return;
	for (i = 0; i < 2; i++)
		if (fds[i].revents)
			link_new(i == 0 ? ORIGIN : ECHO_END,
			    accept(listeners[i], NULL, NULL));
	for (i = 2; i < n; i++) {
		l = whose[i];
		if (l->role && fds[i].revents & POLLOUT)
			link_write(l);
		if (l->role && fds[i].revents & (POLLIN | POLLHUP | POLLERR))
			link_read(l);
		if (l->role == ECHO_END)
			link_write(l);
		if (l->role == ECHO_END && l->shut)
			link_close(l, 0);
	}
}

/* A client of the proxy. */
static struct link *
client_new(void)
{
	char where[40];

	sprintf(where, "127.0.0.1:%d", page->port);
	return link_new(CLIENT, dial(where));
}

/*
 * Asks for an answer of this kind.  How: GET, GET- for the range from 10000
 * on, POST, POST+ with a chunked body, @ for a tunnel to the echo, or a URL;
 * host is that of the URL, or the field.
 */
static void
client_ask(struct link *l, const char *how, const char *host, const char *kind,
    unsigned id, size_t size)
{
	int post = strncmp(how, "POST", 4) == 0, tunnel = *how == '@';
	char url[160];

	link_again(l);
	l->expected = l->body = (struct body){ NO_BODY, id, size, 0 };
	l->judged = strchr(how, '/') == NULL;
	if (tunnel)
		sprintf(url, "%s:%d", host, ports[1]);
	else if (l->judged)
		sprintf(url, "http://%s:%d%s", host, ports[0],
		    path_of(kind, id, size));
	else
		sprintf(url, "%s", how);
	l->out_n = (size_t)sprintf(l->out, "%s %s HTTP/1.1\r\nHost: %s\r\n",
	    tunnel ? "CONNECT" : post ? "POST" : "GET", url, host);
	if (post && how[4] == '+')
		l->out_n += (size_t)sprintf(l->out + l->out_n,
		    "Transfer-Encoding: chunked\r\n");
	else if (post)
		l->out_n += (size_t)sprintf(l->out + l->out_n,
		    "Content-Length: %zu\r\n", size);
	else if (how[3] == '-') {
		l->expected.at = 10000;
		l->out_n += (size_t)sprintf(l->out + l->out_n,
		    "Range: bytes=10000-\r\n");
	}
	l->out_n += (size_t)sprintf(l->out + l->out_n, "\r\n");
	if (post)
		l->body.framing = how[4] == '+' ? CHUNKED : LENGTH;
	if (tunnel) {
		l->body.framing = RAW;
		l->shuts = 1;
	}
}

static int
client_over(const struct link *l)
{
	return l->whole || l->eof || l->broken || l->wrong;
}

/* Of an answer: 0 right, 1 an error status, 2 visibly broken, or says why. */
enum { RIGHT, REFUSED, BROKEN, WRONG };
static char why[300];

static int
client_judge(const struct link *l)
{
	const struct body *b = &l->expected;
	int raw = b->framing == RAW && l->headed;

	if (l->wrong)
		sprintf(why, "wrong bytes after %zu of %zu", b->at, b->size);
	else if (!client_over(l))
		sprintf(why, "hangs after %zu of %zu bytes, status %d", b->at,
		    b->size, l->status);
	else if (l->status < 300 && l->judged && b->at < b->size &&
	    (l->whole || (l->eof && !l->broken && !l->reset && !page->cut &&
	    (raw || b->framing == CLOSES))))
		sprintf(why, "%zu of %zu bytes look whole", b->at, b->size);
	else if (l->status < 300 && b->framing == LENGTH && l->judged &&
	    !l->whole && l->left + b->at != b->size)
		sprintf(why, "wrong Content-Length: %.200s", l->head);
	else if (!l->whole && !(raw && b->at == b->size && l->eof))
		return BROKEN;
	else if (l->status == 200 || l->status == 206)
		return RIGHT;
	else if (l->status >= 400)
		return REFUSED;
	else
		sprintf(why, "status %d", l->status);
	return WRONG;
}

/* Waits for the end of an answer. */
static int
client_wait(struct link *l)
{
	long until = now_ms() + 5000;

	while (!client_over(l) && now_ms() < until)
		turn(100);
	return client_judge(l);
}

/* ---- Both: the proxy, and what it must hold ---- */

static int fds_then, children_then, buffers_then;

/* Starts the proxy and waits for it. */
static void
proxy_start(void)
{
	long until = now_ms() + 20000;

	memset((void *)page, 0, sizeof(*page));
	page->call = CALL_NONE;
	proxy_pid = fork();
	if (proxy_pid == -1)
		exit(1);
	if (proxy_pid == 0) {
		dup2(open("err", O_WRONLY | O_CREAT | O_APPEND, 0600), 2);
		execvp(proxy_argv[0], proxy_argv);
		_exit(127);
	}
	while ((page->turns == 0 || page->busy) && now_ms() < until)
		poll(NULL, 0, 10);
	if (page->turns == 0) {
		printf("# the proxy does not start\n");
		exit(1);
	}
	fds_then = page->fds;
	buffers_then = page->buffers;
	children_then = page->children;
}

/* True, with `why', if the proxy has ended by itself. */
static int
proxy_gone(void)
{
	int status;

	if (proxy_pid == 0 ||
	    waitpid(proxy_pid, &status, WNOHANG) != proxy_pid)
		return proxy_pid == 0;
	proxy_pid = 0;
	sprintf(why, "the proxy is gone, %s %d", WIFSIGNALED(status) ?
	    "signal" : "status", WIFSIGNALED(status) ? WTERMSIG(status) :
	    WEXITSTATUS(status));
	return 1;
}

/* Ends the proxy; false with `why' if it does not exit with 0. */
static int
proxy_end(void)
{
	int status, i;

	if (proxy_gone())
		return 0;
	kill(proxy_pid, SIGTERM);
	for (i = 0; i < 200; i++, turn(100)) {
		if (waitpid(proxy_pid, &status, WNOHANG) != proxy_pid)
			continue;
		sprintf(why, "ends with %x on TERM", (unsigned)status);
		return status == 0;
	}
	sprintf(why, "does not end on TERM");
	kill(proxy_pid, SIGKILL);
	waitpid(proxy_pid, &status, 0);
	return 0;
}

/* Temporary files in the cache. */
static int
temporaries(int remove)
{
	DIR *d = opendir("cache");
	struct dirent *e;
	char path[300];
	int n = 0;

	while (d != NULL && (e = readdir(d)) != NULL)
		if (strncmp(e->d_name, "tmp.", 4) == 0) {
			n++;
			sprintf(path, "cache/%.255s", e->d_name);
			if (remove)
				unlink(path);
		}
	if (d != NULL)
		closedir(d);
	return n;
}

/* Waits until nothing goes on, and looks for what was not given back. */
static int
proxy_quiet(long ms)
{
	long until = now_ms() + ms;
	int left;

	for (;;) {
		left = page->busy || page->fetches || page->making ||
		    page->fds != fds_then || page->buffers != buffers_then ||
		    page->children != children_then || temporaries(0) > 0;
		if (!left)
			return 1;
		if (now_ms() > until)
			break;
		turn(1);
	}
	sprintf(why, "left: busy %d, fetches %d, making %ld, descriptors %d "
	    "of %d, buffers %d of %d, children %d of %d, temporary %d",
	    page->busy, page->fetches, page->making, page->fds, fds_then,
	    page->buffers, buffers_then, page->children, children_then,
	    temporaries(1));
	return 0;
}

static void
clients_close(void)
{
	struct link *l;

	for (l = links; l < links + LINKS; l++)
		if (l->role == CLIENT)
			link_close(l, 1);
}

/* ---- Faults ---- */

#define CALL_NAME(name) #name,
static const char *const call_names[] = { CALLS(CALL_NAME) };

static const struct { int call, errors[9]; } trials[] = {
	{ CALL_read, { EINTR, SHORT, EAGAIN, EIO, ENOBUFS, ECONNRESET } },
	{ CALL_write, { EINTR, SHORT, EAGAIN, EIO, ENOSPC, ENOBUFS,
	    ECONNRESET } },
	{ CALL_pwrite, { EINTR, SHORT, EIO, ENOSPC } },
	{ CALL_open, { EINTR, EMFILE, ENOMEM, EIO, ENOSPC, EACCES } },
	{ CALL_close, { EINTR, EIO } },
	{ CALL_accept, { EINTR, EAGAIN, ECONNABORTED, EMFILE, ENOMEM } },
	{ CALL_socket, { EMFILE, ENOMEM } },
	{ CALL_connect, { EINTR, ENOMEM, ECONNREFUSED } },
	{ CALL_pipe, { EMFILE } },
	{ CALL_fork, { EAGAIN, ENOMEM } },
	{ CALL_rename, { EIO, ENOSPC, ENOENT } },
	{ CALL_fcntl, { ENOMEM } },
	{ CALL_fstat, { EIO, ENOMEM } },
	{ CALL_stat, { EIO, ENOMEM } },
	{ CALL_lstat, { EIO, ENOMEM } },
	{ CALL_unlink, { EIO } },
	{ CALL_mkdir, { EIO, ENOSPC, EMFILE } },
	{ CALL_poll, { EINTR, ENOMEM } },
	{ CALL_malloc, { ENOMEM } },
	{ CALL_calloc, { ENOMEM } },
	{ CALL_regcomp, { ENOMEM } },
	{ CALL_setsockopt, { ENOMEM } },
	{ CALL_getsockopt, { ENOMEM } },
	{ CALL_getsockname, { ENOMEM } },
	{ CALL_lseek, { EIO } },
	{ CALL_futimens, { EIO } },
	{ CALL_statvfs, { EIO } },
};

#define HERE "127.0.0.1"

/* What a scenario has beside one request. */
enum special { PLAIN, PRIMED, TWICE, KEPT, NAMED, HELPER, HUP, SWEEP };

static const struct scenario {
	const char *name, *how, *kind;
	size_t size;
	enum special special;
} scenarios[] = {
	{ "miss", "GET", "lfw", 20000, PLAIN },
	{ "hit", "GET", "lfw", 70000, PRIMED },
	{ "validation", "GET", "lvw", 20000, PRIMED },
	{ "range", "GET-", "lfw", 70000, PRIMED },
	{ "vary", "GET", "yfw", 20000, PLAIN },
	{ "post", "POST", "lnw", 90000, PLAIN },
	{ "upload", "POST+", "cnw", 90000, PLAIN },
	{ "chunked", "GET", "cfw", 90000, PLAIN },
	{ "closes", "GET", "efw", 90000, PLAIN },
	{ "dies", "GET", "cfr", 90000, PLAIN },
	{ "tunnel", "@", "", 90000, PLAIN },
	{ "page", "/status", "", 0, PLAIN },
	{ "collapse", "GET", "cfw", 90000, TWICE },
	{ "kept", "GET", "lnw", 20000, KEPT },
	{ "name", "GET", "lnw", 20000, NAMED },
	{ "helper", "GET", "lnw", 20000, HELPER },
	{ "hup", "GET", "lnw", 9, HUP },
	{ "sweep", "GET", "lfw", 70000, SWEEP },
};

/* One request over a connection of its own, or two at the same time. */
static int
get(const char *how, const char *host, const char *kind, unsigned id,
    size_t size, int twice)
{
	struct link *l = client_new(), *m = twice ? client_new() : NULL;
	int result = WRONG;

	sprintf(why, "no connection");
	if (l == NULL)
		return WRONG;
	client_ask(l, how, host, kind, id, size);
	if (m != NULL)
		client_ask(m, how, host, kind, id, size);
	result = client_wait(l);
	link_close(l, 1);
	if (m != NULL && result != WRONG) {
		int other = client_wait(m);

		result = other > result ? other : result;
		link_close(m, 1);
	}
	return result == BROKEN && kind[0] && kind[2] != 'w' ? RIGHT : result;
}

/* HUP: the log is another, the rules are read again and say the same. */
static int
hup(unsigned id)
{
	long turns = page->turns, until = now_ms() + 5000;

	rename("log", "log.old");
	kill(proxy_pid, SIGHUP);
	while ((page->turns < turns + 2 || page->busy) && now_ms() < until)
		turn(1);
	page->call = CALL_NONE;
	if (now_ms() < until &&
	    get("GET", "denied.test", "lnw", id, 9, 0) == REFUSED &&
	    get("GET", "listed.test", "lnw", id, 9, 0) == REFUSED)
		return RIGHT;
	sprintf(why, "HUP hangs, or a rule was lost");
	return WRONG;
}

static int
run(const struct scenario *s, unsigned id)
{
	char host[40] = HERE;
	struct link *l;

	if (s->special == HELPER && page->helper > 0)
		kill(page->helper, SIGKILL);
	for (l = links; l < links + LINKS && s->special == KEPT; l++)
		if (l->role == ORIGIN)
			link_close(l, 0);
	if (s->special == NAMED || s->special == HELPER)
		sprintf(host, "n%u.test", id);
	if (*s->how == '/')
		sprintf(host, "127.0.0.1:%d", page->port);
	return s->special == HUP ? hup(id) : get(s->how, host, s->kind, id,
	    s->size, s->special == TWICE);
}

/* True for faults that a client does not notice if the proxy is right. */
static int
is_hidden(int call, int error)
{
	return error == EINTR || error == EAGAIN || error == SHORT ||
	    (call != CALL_read && call != CALL_write && call != CALL_accept &&
	    call != CALL_socket && call != CALL_connect &&
	    call != CALL_fcntl && call != CALL_malloc && call != CALL_calloc &&
	    call != CALL_getsockopt && call != CALL_getsockname &&
	    call != CALL_lseek);
}

/* These make the proxy wait for a second. */
static int
is_slow(const struct scenario *s, int call, int error)
{
	return s->special == HELPER ||
	    (call == CALL_accept && (error == EMFILE || error == ENOMEM));
}

/* The next n-th use of a call fails. */
static void
arm(int call, int error, long n)
{
	page->call = CALL_NONE;
	page->count = page->fired = page->cut = page->badfd = 0;
	page->n = n;
	page->error = error;
	page->call = call;
}

/* One fault, and what comes after it.  False, with `why', if that is wrong. */
static int
fault_try(const struct scenario *s, int call, int error, long n, int *fired)
{
	static const char *const results[] = { "right", "refused", "broken" };
	unsigned id = ids++;
	long turns, began;
	int result, i;

	if (s->special == PRIMED) {
		(void)get("GET", HERE, s->kind, id, s->size, 0);
		(void)proxy_quiet(3000);
	}
	why_origin[0] = '\0';
	turns = page->turns;
	page->children_too = s->special == SWEEP;
	arm(call, error, n);
	result = run(s, id);
	/* What is done behind the answer's end belongs to it. */
	for (i = 0; i < 3000 && page->busy && result != WRONG &&
	    !page->fired; i++)
		turn(1);
	page->call = CALL_NONE;
	*fired = page->fired;
	if (result == WRONG)
		return 0;
	if (result != RIGHT && (!*fired || is_hidden(call, error))) {
		sprintf(why, "the client sees it: %s", results[result]);
		return 0;
	}
	if (!*fired)
		return proxy_quiet(3000);
	began = now_ms();
	result = get("GET", HERE, "lnw", ids++, 1000, 0);
	if (result == RIGHT)
		result = run(s->special == HELPER ? s - 1 : s, id);
	if (result == REFUSED || result == BROKEN)
		sprintf(why, "then %s", results[result]);
	else if (now_ms() - began > (is_slow(s, call, error) ? 3000 : 500))
		sprintf(why, "then slow: %ld ms", now_ms() - began);
	else if (page->badfd > 0)
		sprintf(why, "closes what is closed");
	else if (page->turns - turns > 1500)
		sprintf(why, "spins: %ld turns", page->turns - turns);
	else if (why_origin[0] != '\0')
		strcpy(why, why_origin);
	else if (result == RIGHT) {
		if (call == CALL_unlink)
			(void)temporaries(1);
		return proxy_quiet(3000);
	}
	return 0;
}

/* The same; false if the call was not used so often. */
static int
fault_once(const struct scenario *s, int call, int error, long n, int *failed)
{
	int ever = page->ever, fired, good = fault_try(s, call, error, n,
	    &fired), gone = proxy_gone();

	if (good && !gone)
		return fired;
	++*failed;
	printf("# %s %s %ld%s, %s: %s\n", call_names[call], error == SHORT ?
	    "short" : strerror(error), n, ever ? " and all" : "", s->name,
	    why);
	fflush(stdout);
	clients_close();
	if (!gone)
		(void)proxy_end();
	proxy_start();
	page->ever = ever;
	return fired;
}

/* Each use of a call fails.  Returns how many did. */
static int
fault_all(const struct scenario *s, int call, int error, long most,
    int *failed)
{
	long n = 1, m = 1;

	if (s->special == HELPER ? call != CALL_pipe &&
	    (call != CALL_fork || error != EAGAIN) :
	    s > scenarios && is_slow(s, call, error))
		return 0;
	page->ever = 0;
	while (n <= most && fault_once(s, call, error, n, failed))
		n++;
	if (error == EINTR || error == EAGAIN || error == SHORT ||
	    call == CALL_accept || call == CALL_poll || s->special == HELPER)
		return (int)n - 1;
	page->ever = 1;
	while (m <= most && m < 9 && fault_once(s, call, error, m, failed))
		m++;
	return (int)(n + m) - 2;
}

static int
faults(long most, char **names)
{
	const struct scenario *s;
	size_t i;
	int number = 0, bad = 0, runs, failed, j;
	long began;

	for (s = scenarios; s < scenarios + COUNT(scenarios); s++) {
		for (j = 0; names[j] != NULL && strcmp(names[j], s->name); j++)
			;
		if (j > 0 && names[j] == NULL)
			continue;
		if (s->special == SWEEP) {
			(void)proxy_end();
			proxy_argv[6] = "1M";
			proxy_start();
		}
		began = now_ms();
		runs = failed = 0;
		for (i = 0; i < COUNT(trials); i++)
			for (j = 0; trials[i].errors[j] != 0; j++)
				runs += fault_all(s, trials[i].call,
				    trials[i].errors[j], most, &failed);
		bad += failed > 0;
		printf("%s %d - faults %s: %d faults in %ld ms, %d failed\n",
		    failed ? "not ok" : "ok", ++number, s->name, runs,
		    now_ms() - began, failed);
		fflush(stdout);
	}
	number++;
	if (proxy_end())
		printf("ok %d - faults end: the proxy ends with 0\n", number);
	else
		printf("not ok %d - faults end: %s\n", number, why), bad++;
	printf("%d passed, %d failed, 0 skipped\n", number - bad, bad);
	return bad > 0;
}

/* ---- Soak ---- */

enum { CLIENTS = 60, RATE = 400 };

/* What the soak's clients have done and seen. */
static struct {
	unsigned long asked;	/* requests, all */
	unsigned long logged;	/* of them surely have a line in the log */
	unsigned long results[4], bad, quit, faults;
} seen;

static void
soak_fail(const struct link *l)
{
	char line[100] = "";

	(void)sscanf(l->asks, "%90[^\r]", line);
	if (seen.bad++ < 20)
		printf("# %s: %s\n", line, why);
	fflush(stdout);
}

/* The next request over l. */
static void
soak_ask(struct link *l)
{
	static const char *const kinds[] = { "lnw", "lnw", "lfw", "lfw", "lfw",
		"lvw", "cnw", "cfw", "enw", "efw", "yfw", "lnx", "lfx", "cfx",
		"cfr", "enr", "lfr", "cnr" };
	static const char *const hosts[] = { HERE, HERE, "a.test", "b.test",
		"c.test", NULL };
	const char *kind = kinds[chance(COUNT(kinds))], *how = "GET";
	const char *host = hosts[chance(5)];
	unsigned of = 1 + chance(60), what = chance(20);
	size_t size = of * 1500;
	char unique[40];

	if (kind[1] == 'n') {
		of = ids++;
		size = chance(10) ? chance(5000) : chance(600000);
		if (chance(10) == 0)
			how = chance(2) ? "POST" : "POST+";
	}
	if (what == 0 && l->rest == 0)
		how = "@", host = HERE;
	else if (what == 1)
		how = chance(2) ? "/status" : "/metrics";
	else if (what == 2)
		how = chance(2) ? "http://denied.test/" : "http://127.0.0.1:1/";
	else if (what == 3) {
		sprintf(unique, "n%u.test", ids++);
		host = unique;
	}
	if (*how == '/') {
		sprintf(unique, "127.0.0.1:%d", page->port);
		host = unique;
	}
	l->step = l->gap = 0;
	if (size < 30000 && chance(8) == 0) {
		l->step = 500;
		l->gap = 1 + chance(5);
	}
	client_ask(l, how, host, kind, of, size);
	l->deserves = kind[2] == 'w' && *how != 'h';
	l->shuts = l->rest == 0 && (l->shuts || chance(8) == 0);
	l->quits = chance(10) == 0 ? 1 + chance(3) : 0;
	l->until = now_ms() + 20000;
	memcpy(l->asks, l->out, sizeof(l->asks) - 1);
	seen.asked++;
}

/* Looks after a client: its answer may be over, or it goes away. */
static void
soak_see(struct link *l)
{
	int result, late = now_ms() > l->until;

	/* Before, within, or right behind the answer's head. */
	if ((l->quits == 1 && l->out_at > 0) || (l->quits == 2 && l->headed) ||
	    (l->quits == 3 && l->expected.at > 0 && !client_over(l))) {
		seen.quit++;
		seen.logged += l->headed;
		link_close(l, 1);
		return;
	}
	if (!client_over(l) && !late)
		return;
	result = client_judge(l);
	seen.results[result]++;
	seen.logged += l->headed || l->eof;
	if (result != WRONG && result != RIGHT && l->deserves) {
		sprintf(why, "%s, status %d, %zu of %zu bytes%s%s", result ==
		    BROKEN ? "broken" : "refused", l->status, l->expected.at,
		    l->expected.size, l->eof ? ", eof" : "",
		    l->broken ? ", error" : "");
		result = WRONG;
	}
	if (result == WRONG)
		soak_fail(l);
	if (result == RIGHT && l->rest > 0 && !l->shut) {
		l->rest--;
		soak_ask(l);
	} else
		link_close(l, chance(8) > 0);
}

/* Lines in all logs. */
static unsigned long
log_lines_all(void)
{
	DIR *d = opendir(".");
	struct dirent *e;
	unsigned long n = 0;
	FILE *f;
	int c;

	while (d != NULL && (e = readdir(d)) != NULL) {
		if (strncmp(e->d_name, "log", 3) != 0 ||
		    (f = fopen(e->d_name, "r")) == NULL)
			continue;
		while ((c = getc(f)) != EOF)
			n += c == '\n';
		fclose(f);
	}
	closedir(d);
	return n;
}

/* The proxy's resident memory in KiB; 0: not known. */
static long
memory(void)
{
	char path[40];
	long all, resident = 0;
	FILE *f;

	sprintf(path, "/proc/%ld/statm", (long)proxy_pid);
	f = fopen(path, "r");
	if (f == NULL || page->sanitized ||
	    fscanf(f, "%ld %ld", &all, &resident) != 2)
		resident = 0;
	if (f != NULL)
		fclose(f);
	return resident * sysconf(_SC_PAGESIZE) / 1024;
}

/* Makes some call fail soon, in a way that no client may notice. */
static void
soak_fault(void)
{
	size_t i = chance(COUNT(trials));
	int error, call = trials[i].call;

	do
		error = trials[i].errors[chance(COUNT(trials[i].errors))];
	while (error == 0);
	seen.faults += page->fired != 0;
	page->ever = 0;
	arm(is_hidden(call, error) && call != CALL_unlink ? call : CALL_NONE,
	    error, 1 + (long)chance(20));
}

/* Clients of all kinds, for so long; with faults, if they are wanted. */
static void
soak_run(long ms, int faulty)
{
	long began = now_ms(), next = began + 1000, now, started = 0;
	struct link *l;
	char name[40];
	int n, hups = 0;

	do {
		now = now_ms();
		for (n = 0, l = links; l < links + LINKS; l++)
			if (l->role == CLIENT) {
				soak_see(l);
				n += l->role == CLIENT;
			}
		for (; n < CLIENTS && now < began + ms &&
		    started < (now - began) * RATE / 1000 + 1; n++) {
			started++;
			if ((l = client_new()) == NULL)
				break;
			l->rest = (int)chance(6);
			soak_ask(l);
		}
		turn(2);
		if (faulty && (page->fired || chance(8) == 0))
			soak_fault();
		if (now < next || now > began + ms)
			continue;
		next += 1000;
		sprintf(name, "log.%ld", now);
		rename("log", name);
		kill(proxy_pid, SIGHUP);
		if (++hups % 7 == 0 && page->helper > 0)
			kill(page->helper, SIGKILL);
	} while (!proxy_gone() && (n > 0 || now < began + ms));
	page->call = CALL_NONE;
}

static int soak_number, soak_bad;

static void
soak_says(const char *what, int good, const char *words)
{
	printf("%sok %d - soak %s: %s\n", good ? "" : "not ", ++soak_number,
	    what, words);
	soak_bad += !good;
}

static int
soak(long seconds)
{
	unsigned long lines, before;
	long warm, end;
	int quiet;

	quiet = proxy_quiet(10000);
	before = log_lines_all();
	soak_run(seconds * 1000 / 3, 0);
	quiet = proxy_quiet(10000);
	warm = memory();
	if (quiet)
		soak_run(seconds * 1000 * 2 / 3, 1);
	quiet = quiet && !proxy_gone() && proxy_quiet(10000);
	soak_says("leaks", quiet, quiet ? "nothing is left" : why);
	end = memory();
	sprintf(why, "%ld KiB, %ld when warm", end, warm);
	if (warm > 0)
		soak_says("memory", end <= warm + warm / 4 + 2048, why);
	else
		printf("ok %d - soak memory # SKIP no /proc, or sanitizers\n",
		    ++soak_number);
	sprintf(why, "%lu answers right, %lu refused, %lu broken, %lu left, "
	    "%lu bad; %lu faults", seen.results[RIGHT], seen.results[REFUSED],
	    seen.results[BROKEN], seen.quit, seen.bad,
	    seen.faults);
	soak_says("answers", seen.bad == 0 && seen.results[RIGHT] > 0, why);
	soak_says("origin", why_origin[0] == '\0', why_origin[0] ?
	    why_origin : "it got whole requests");
	lines = log_lines_all() - before;
	sprintf(why, "%lu lines for %lu requests, %lu of them answered", lines,
	    seen.asked, seen.logged);
	soak_says("log", lines >= seen.logged && lines <= seen.asked, why);
	quiet = proxy_end();
	soak_says("end", quiet, quiet ? "with 0 on TERM" : why);
	printf("%d passed, %d failed, %d skipped\n", soak_number - soak_bad -
	    (warm == 0), soak_bad, warm == 0);
	return soak_bad > 0;
}

/* MODE COUNT [SCENARIO...], in a directory with ./proxy and its rules. */
int
main(int argc, char **argv)
{
	static char *args[] = { "./proxy", "-l", "127.0.0.1:0", "-c", "cache",
	    "-s", "64M", "-f", "rules", "-o", "log", "-m", "200", NULL };
	int fd = open("page", O_RDWR | O_CREAT | O_TRUNC, 0600), i;

	if (argc < 3 || ftruncate(fd, sizeof(*page)) == -1 ||
	    (page = mmap(NULL, sizeof(*page), PROT_READ | PROT_WRITE,
	    MAP_SHARED, fd, 0)) == MAP_FAILED)
		return 2;
	signal(SIGPIPE, SIG_IGN);
	setenv("FAULT_PAGE", "page", 1);
	setenv("NAME_ADDRESSES", "127.0.0.1", 1);
	for (i = 0; i < 2; i++) {
		listeners[i] = hear("127.0.0.1", &ports[i], 256);
		fcntl(listeners[i], F_SETFL, O_NONBLOCK);
	}
	proxy_argv = args;
	if (strcmp(argv[1], "soak") == 0)
		proxy_argv[6] = "1M";
	proxy_start();
	return strcmp(argv[1], "soak") == 0 ? soak(atol(argv[2])) :
	    faults(atol(argv[2]), argv + 3);
}
#endif
EOF_FAULTS
}

# Builds the driver, and the proxy with sanitizers if such a program runs here:
# then main() says 99 to a page that it can't map.
faults_build() {
	write_faults
	$cc -O1 -DDRIVER "-I$work" -o driver faults.c > build.log 2>&1 || return
	for flags in '-fsanitize=address,undefined -fno-sanitize-recover=all' \
	    ''; do
		# shellcheck disable=SC2086 # flags are words
		$cc -g -O1 $flags -DBUFFER_SIZE=4096 "-I$here" "-I$work" -I. \
		    -o proxy faults.c > build.log 2>&1 || continue
		FAULT_PAGE=none ./proxy > run.log 2>&1
		[ $? != 99 ] || return 0
	done
	return 1
}

# Both: faults [N [SCENARIO...]], soak SECONDS
faults() (
	case ${2-60} in
	*[!0-9]*) set -- "$1" '' ;;
	esac
	if [ -z "${2-60}" ] || [ "$1$#" = soak1 ]; then
		echo "usage: test.sh faults [n [scenario ...]]," \
		    "test.sh soak SECONDS" >&2
		exit 2
	fi
	mkdir "$work/faults" && cd "$work/faults" || exit 1
	if ! faults_build; then
		echo "not ok 1 - $1: cc: $(head -n 1 build.log)"
		echo "0 passed, 1 failed, 0 skipped"
		exit 1
	fi
	echo 'deny host denied.test' > rules
	echo 'deny list "list"' >> rules
	echo listed.test > list
	[ $# -gt 1 ] || set -- "$1" 60
	./driver "$@"
	faults_status=$?
	grep -e 'runtime error:' -e 'ERROR: .*Sanit' -e Assertion err |
	    sed 's/^/# /'
	exit $faults_status
)

# ---- 36. Coverage -----------------------------------------------------------

# Adds up what gcov says of each build of proxy.c, with marks: a line counts as
# run if one of them has run it.  Prints the lines that none has, and shares.
coverage() {
	have gcov || { echo "no gcov"; return 1; }
	mkdir "$work/gcov" && cd "$work/gcov" || return 1
	find "$work" -name '*.gcda' > found
	n=0
	while read -r gcda; do
		n=$((n + 1))
		mkdir "$n"
		(cd "$n" && gcov -b -c -o "$gcda" "$gcda" > /dev/null 2>&1)
	done < found
	cat [0-9]*/proxy.c.gcov 2> /dev/null | awk -F : '
	/^branch +[0-9]+ / {
		split($0, word, / +/)
		if (line && code[line]) {
			key = line " " word[2]
			taken[key] += word[4]
		}
		next
	}
	/^ *[-#=0-9]+[*]?: *[0-9]+:/ {
		line = $2 + 0
		if (line == 0 || $1 ~ /-/)
			next
		code[line] = 1
		if ($1 !~ /[#=]/)
			run[line] = 1
		text[line] = substr($0, index($0, $2) + length($2) + 1)
	}
	END {
		for (i = 1; i < 100000; i++)
			if (code[i]) {
				lines++
				if (run[i])
					hit++
				else
					printf "proxy.c:%d:%s\n", i, text[i]
			}
		for (key in taken) {
			split(key, word, " ")
			if (run[word[1]]) {
				branches++
				both += taken[key] > 0
			}
		}
		if (lines)
			printf "coverage: %.1f %% of %d lines, %.1f %% of %d" \
			    " branches in them\n", hit * 100 / lines, lines,
			    both * 100 / (branches ? branches : 1), branches
		exit !lines || hit * 100 <= lines * 93
	}'
}

# ---- 37. The run ------------------------------------------------------------

# Builds with more flags than CFLAGS, -O0 where cc takes longer than what it
# builds, but not for an emulator: build OUTPUT SOURCE FLAG...
build() {
	build_out=$1
	build_from=$2
	shift 2
	# shellcheck disable=SC2086 # flags are words
	$cc $cflags "$@" "-I$here" -o "$build_out~" "$build_from" \
	    > "$build_out.errors" 2>&1 && emulated "$build_out" &&
		mv "$build_out~" "$build_out"
	echo $? > "$build_out.status"
}

# Puts a script in the place of a program in OUTPUT~ that needs the emulator.
emulated() {
	[ -n "${EMULATOR-}" ] || return 0
	mv "$1~" "$1.program"
	printf '#!/bin/sh\nexec %s %s "$@"\n' "$EMULATOR" "$1.program" > "$1~"
	chmod 755 "$1~"
}

# Waits for a build that was started in the background.
built() {
	[ -f "$1.status" ] || "$peer" await 120000 "$1.status" || fail "$1 is not built in time"
	[ -f "$1" ] || fail "cc: $(head -n 1 "$1.errors")"
}

# Runs every test that no other lane has taken.
lane() {
	while read -r lane_test lane_promise <&3; do
		case " $tests " in
		*" $lane_test "*) ;;
		*) continue ;;
		esac
		[ ! -f "$work/t.$lane_test/.taken" ] || continue
		lane_mine=
		set -C
		! { echo > "$work/t.$lane_test/.taken"; } 2> /dev/null || lane_mine=1
		set +C
		[ -n "$lane_mine" ] || continue
		run_test "$lane_test" "$lane_promise" 3<&-
	done 3< "$work/order"
}

clean_up() {
	trap '' HUP INT TERM
	for clean_pid in $lanes; do
		kill -TERM "$clean_pid" 2> /dev/null
	done
	[ ! -x "$peer" ] || "$peer" reap "$work"
	wait
	# Once more if somebody was still writing there.
	rm -rf "$work" 2> /dev/null || rm -rf "$work"
}

work=$(mktemp -d "${TMPDIR:-/tmp}/proxy-test.XXXXXX") || exit 1
lanes=
trap clean_up EXIT
trap 'exit 1' HUP INT TERM
peer=$work/peer
write_peer
# Static, for it is started some thousand times, and by musl if there is one: what
# the C library does at the start costs more than most that peer has to do.
host_cc=$cc
[ -z "${EMULATOR-}" ] || host_cc=cc
{
	{ musl-gcc -static -O1 -o "$peer" "$work/peer.c" ||
	    $host_cc -static -O1 -o "$peer" "$work/peer.c"; } 2> /dev/null ||
		$host_cc -o "$peer" "$work/peer.c"
} &
peer_pid=$!

# Nothing but cc can be used before peer is built.
peer_ready() {
	wait "$peer_pid" && return
	echo "test.sh: cannot build the helper program" >&2
	exit 1
}

proxy_bin=${PROXY:-$work/proxy}
write_names
write_unit_head
case ${1-} in
fuzz)
	peer_ready
	shift
	fuzz "$@"
	exit
	;;
faults | soak)
	peer_ready
	faults "$@"
	exit
	;;
model)
	peer_ready
	model
	exit
	;;
esac
coverage=
if [ "${1-}" = coverage ]; then
	shift
	coverage=yes
	cflags="$cflags -O0 --coverage"
	# Also for proxies that run as another user.
	chmod 755 "$work"
	umask 0
fi
# Beside the proxy of most tests, with the buffers that README has for boards.
board_buffer=$(sed -n 's/.*CPPFLAGS=-DBUFFER_SIZE=\([0-9]*\).*/\1/p' "$here/README" 2> /dev/null)
case $cflags in
*BUFFER_SIZE*) board= ;;
*) board=${board_buffer:+-DBUFFER_SIZE=$board_buffer} ;;
esac
{
	traced=
	! traces || traced=-finstrument-functions
	# shellcheck disable=SC2086 # one or none
	build "$work/names" "$work/names.c" -O0 ${EMULATOR:+-O1} $board '-DLOG_SOCKET="log.socket"' $traced
	# What a whole run needs, while the proxy is built.
	[ $# -gt 0 ] || built_tables
	[ $# -gt 0 ] || sanitized || built_small
} &
lanes="$lanes $!"
if [ -z "${PROXY-}" ]; then
	build "$proxy_bin" "$here/proxy.c"
	if [ ! -x "$proxy_bin" ]; then
		cat "$proxy_bin.errors" >&2
		exit 1
	fi
fi
peer_ready

if [ "${1-}" = bench ]; then
	bench
	exit
fi

# The tests that take longest begin first, so that no lane has to wait for them.
sed -n 's/^test_\([a-z0-9_]*\)() { *#* */\1 /p' "$self" > "$work/promises"
tests=$(sed 's/ .*//' "$work/promises" | tr '\n' ' ')
long='resources_board real_apt unit_model resources_tunnels real_git
	style_walks limit_silence cache_collapsed_broken cache_collapsed_never
	limit_times real_lessons real_browser real_apt_cache
	real_haproxy_load real_haproxy_balance real_parent_socks list_million bend_hang
	log_pipe signal_usr1'
for test in $long; do
	grep "^$test " "$work/promises"
done | cat - "$work/promises" > "$work/order"
if [ $# -gt 0 ]; then
	wanted=
	for test in $tests; do
		for word; do
			case $test in
			*"$word"*) wanted="$wanted $test"; break ;;
			esac
		done
	done
	tests=$wanted
fi
if [ -z "$tests" ]; then
	echo "test.sh: no test has such a name: $*" >&2
	exit 1
fi
read_limits

(cd "$work" && set -- && for test in $tests; do
	set -- "$@" "t.$test"
done && mkdir "$@")
n=0
while [ $n -lt "${JOBS:-8}" ]; do
	lane &
	lanes="$lanes $!"
	n=$((n + 1))
done
number=0
passed=0
failed=0
skipped=0
for test in $tests; do
	# It is there when its line is whole.
	until read -r result < "$work/t.$test/.result"; do
		# In the background, that a signal is heard at once.
		(cd "$work" && exec "$peer" await 60000 "t.$test/.result" > .awaited) &
		wait $!
	done 2> /dev/null
	number=$((number + 1))
	printf '%s %d - %s\n' "${result%% - *}" $number "${result#* - }"
	case $result in
	*' # SKIP '*) skipped=$((skipped + 1)) ;;
	ok*) passed=$((passed + 1)) ;;
	*)
		failed=$((failed + 1))
		[ $verbose = 0 ] || for file in .out log err; do
			sed "s/^/#   $file: /" "$work/t.$test/$file"
		done 2> /dev/null
		;;
	esac
done
[ -z "$coverage" ] || coverage || failed=$((failed + 1))
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
