/*
 * proxy - an HTTP/1.1 forward proxy in one file of C99 and POSIX
 *
 * It stands between clients and the servers they ask: it takes a request,
 * finds the server, passes the request on and the response back, and writes
 * one line about it.  One process serves, in one loop around poll(2) that
 * waits nowhere else; children look up names and sweep the cache.  With -j,
 * several such processes share the listening sockets, the cache and the log,
 * under a supervisor that serves nobody.
 *
 *   client bytes -> whole head -> parse -> rules -> cache? --hit---+
 *                                                     |miss, stale |
 *              resolve -> rules on the address -> connect          |
 *                                                         |        v
 *                          request out -> response head --+-> rules
 *                                                                  |
 *   log line <- finish <- client <- framing <- rules <- payload <--+
 *                                  (copied to the entry if it is stored)
 *
 * It rests on four nouns.  An EXCHANGE is a client's connection and what is
 * being done for it.  It ties two CONNS, `client` and `server`, each a
 * descriptor with the bytes that have arrived (`in`) and those to be sent
 * (`out`).  The server is whoever answers: a socket, a file (a cache entry's,
 * or a rule's), or memory (an error page, a page of the proxy, the 200 to a
 * CONNECT); its answer is read, judged, forwarded and logged by the same lines.
 * A FLOW is one message in motion: it removes the framing on arrival and adds
 * its own on departure; received framing is never copied.  Two flows, `up` and
 * `down`, run side by side in one exchange; a tunnel is two flows that copy
 * bytes until they end.  RULES say who may go where, by which route, and what
 * may come back; they are asked again as more becomes known.  They may also
 * bend an exchange, to try out failures: delay it, slow it down, cut it, or
 * answer for a server.
 *
 * Three lifetimes, three structs.  An EXCHANGE is a slot of at most 480 bytes:
 * an idle client and an idle tunnel cost this and nothing more.  A REQUEST
 * lives from its first byte to its line in the log, comes from a pool, is
 * parsed once, and holds, each in a struct of its own, the decisions of the
 * rules (access), the way to the server (route), and the state of the request
 * in the cache (caching).  An ENTRY is a file of the cache, and exists only
 * there.
 *
 * An exchange walks through phases.  Each but FREE has one step function, in
 * the table of exchange_run(); only exchange_enter() changes the phase:
 *
 *   FREE --exchange_open--> REQUEST --request_accept, exchange_look_up-->
 *      COLLAPSE (another fetches the same), RESOLVE
 *   COLLAPSE --collapse_step--> RESOLVE (if nobody else brought the answer)
 *   RESOLVE --resolve_step--> CONNECT --connect_step--> GREET (SOCKS parent)
 *   CONNECT, GREET --connect_open, exchange_send--> RESPONSE
 *   RESPONSE --response_forward, response_tunnel, response_resume--> RELAY
 *   RESPONSE --response_retry--> CONNECT (a kept connection was no good)
 *   RESPONSE --response_validates--> CONNECT (the entry to validate is gone)
 *   RESOLVE, CONNECT, GREET --parent_next--> RESOLVE (by another parent)
 *   any before RELAY --exchange_refuse, exchange_answer--> RESPONSE (a page)
 *   before CONNECT --bend_apply--> RESPONSE (a rule answers, or lets it hang)
 *   any before RELAY --exchange_serve--> RESPONSE (from an entry)
 *   RELAY --relay_resume--> RESOLVE (the fetch it was following failed)
 *   FREE --relay_part, exchange_take_refresh--> RELAY, REQUEST (no client)
 *   RELAY --exchange_finish--> REQUEST or LINGER --linger_step--> FREE
 *   any --exchange_abort, exchange_close--> FREE
 *
 * Three walks, each the names of functions in the order in which they run:
 *
 * walk miss: loop_accept, exchange_open, exchange_run, request_step,
 *   request_accept, request_parse, access_begin, rules_judge,
 *   exchange_look_up, cache_find, resolve_step, connect_step, connect_next,
 *   connect_open, exchange_send, request_build, response_step, response_accept,
 *   response_parse, response_forward, cache_store, response_pass,
 *   response_build, relay_step, exchange_pump, flow_decode, cache_append,
 *   flow_encode, exchange_finish, log_exchange.
 * walk hit: loop_accept, exchange_open, request_step, request_accept,
 *   access_begin, exchange_look_up, cache_find, entry_find, lookup_judge,
 *   exchange_serve, response_step, response_accept, response_from_entry,
 *   cache_shape, response_forward, response_build, relay_step,
 *   exchange_finish, log_exchange.
 * walk connect: loop_accept, exchange_open, request_step, request_accept,
 *   access_begin, resolve_step, connect_step, connect_open, response_step,
 *   response_accept, response_tunnel, relay_step, exchange_pump,
 *   tunnel_judge, exchange_close, exchange_end, log_exchange.
 *
 * What always holds (exchange_check() asserts most of it after every turn):
 *
 *   1. A free slot has no descriptor, no buffer and no request.
 *   2. A buffer in `out` is never empty: nothing to send, no buffer.
 *   3. A flow that has sent the end of its message has no bytes ready.
 *   4. Decoded bytes are the first ones of the buffer they arrived in.
 *   5. Only the phases that talk to a server hold a server's descriptor.
 *   6. A tunnel has no request.
 *   7. Nothing in `out` was cut because a buffer was full.
 *   8. An exchange without a client's descriptor fetches for the cache.
 *   9. From COLLAPSE to RELAY there is a request, unless it is a tunnel.
 *  10. A follower never reads more of an entry than its leader has stored.
 *
 * It reads from top to bottom: each section uses only those above it, main
 * is last.  A section's head says what it is for, and lists under "Door" the
 * functions and variables that other sections may use; all others are its own.
 * Rules and cache are chapters of several sections, with one more door: the at
 * most twelve functions that the rest of the program may call.
 *
 * It obeys RFC 9110 (semantics), 9111 (caching), 9112 (messages), 8305 (happy
 * eyeballs), 9209 (Proxy-Status), 9211 (Cache-Status), 5861 (stale content),
 * 1928 and 1929 (SOCKS5), 7617 (Basic), 8446 and 6066 (the name in a TLS
 * greeting), and the PROXY protocol of HAProxy, versions 1 and 2.
 *
 * Sections: 1 system and limits, 2 vocabulary, 3 small tools, 4 buffers and
 * requests, 5 conns, 6 and 7 heads, 8 bodies and flows, 9 matchers and lists,
 * 10 to 12 rules, 13 freshness, 14 and 15 store, 16 and 17 cache, 18 names, 19
 * log, 20 recording, 21 trace, 22 heads and pages, 23 to 25 exchange, 26 loop,
 * 27 workers, 28 options and listeners, 29 main.
 */

/* ---- 1. System and limits ---- */

/*
 * The feature macros come before all includes.  Everything is POSIX.1-2008 but
 * one call: setgroups(2), which no standard has and without which the process
 * would keep root's groups after -u.
 */
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE 1
#define _DARWIN_C_SOURCE 1
#define __BSD_VISIBLE 1

/*
 * Sizes, inode numbers and times have 64 bits on 32-bit systems, too:
 * otherwise readdir(3) and stat(2) fail on large values, and time overflows in
 * 2038.
 */
#define _FILE_OFFSET_BITS 64
#define _TIME_BITS 64

/* glibc's regex.h has an array parameter in a form that tcc does not take. */
#ifdef __TINYC__
#define _REGEX_NELTS(n)
#endif

#include <sys/types.h>

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <netdb.h>
#include <poll.h>
#include <pwd.h>
#include <regex.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

/*
 * Values that a board or a test may change at compile time (-DNAME=value).
 * The size of a buffer limits one read or write, and the size of a head.  Of
 * 16, 32 and 64 KiB the last is the fastest by far for large bodies and no
 * slower for small ones.  An idle connection holds no buffer.
 */
#ifndef BUFFER_SIZE
#define BUFFER_SIZE 65536
#endif
#ifndef HEAD_MS
#define HEAD_MS 30000
#endif
#ifndef CONNECT_MS
#define CONNECT_MS 30000
#endif
#ifndef IDLE_MS
#define IDLE_MS 300000
#endif
#ifndef HALF_CLOSED_MS
#define HALF_CLOSED_MS 60000
#endif
#ifndef KEPT_CLIENT_MS
#define KEPT_CLIENT_MS 60000
#endif
#ifndef KEPT_SERVER_MS
#define KEPT_SERVER_MS 30000
#endif
#ifndef COLLAPSE_MS
#define COLLAPSE_MS 10000
#endif
#ifndef LINGER_MS
#define LINGER_MS 5000
#endif
#ifndef LINGER_ALL_MS
#define LINGER_ALL_MS 30000
#endif
#ifndef LISTEN_RETRY_MS
#define LISTEN_RETRY_MS 60000
#endif
#ifndef DRAIN_MS
#define DRAIN_MS 5000
#endif
#ifndef SWEEP_MS
#define SWEEP_MS 3600000
#endif
/* Where the system's logger listens; those of BSD are tried after it. */
#ifndef LOG_SOCKET
#define LOG_SOCKET "/dev/log"
#endif
/* POSIX lets it be undefined where it differs from pipe to pipe. */
#ifndef PIPE_BUF
#define PIPE_BUF _POSIX_PIPE_BUF
#endif
#if BUFFER_SIZE < 4096 || BUFFER_SIZE > 65536
#error "BUFFER_SIZE: from 4096, for our own pages, to 65536, see struct place"
#endif

#define VERSION "0.1"

enum limit {
	/* Data in a buffer: its struct and malloc(3)'s own have the rest. */
	BUFFER_ROOM = BUFFER_SIZE - 8 * (int)sizeof(size_t),
	/* Kept free in front of the data: 8 hex digits and CRLF. */
	CHUNK_ROOM = 10,
	/* Kept free behind them: CRLF, "0" CRLF CRLF, and some to spare. */
	TAIL_ROOM = 16,
	/* RFC 9112 section 3 asks for 8000 bytes of request line at least. */
	LINE_WISH = BUFFER_SIZE / 4 > 8192 ? BUFFER_SIZE / 4 : 8192,
	LINE_MAX_BYTES = LINE_WISH < BUFFER_SIZE - 1024 ? LINE_WISH :
							  BUFFER_SIZE - 1024,
	/* Fields in a head: sites have sent 200; each takes 8 bytes. */
	FIELDS_MAX = BUFFER_SIZE / 32 < 400 ? BUFFER_SIZE / 32 : 400,
	/* A DNS name has at most 253 characters. */
	HOST_MAX = 255,
	/* Addresses tried for one name; all fit into one write to a pipe. */
	ADDRESSES_MAX = 16,
	LISTENERS_MAX = 16,
	/* Descriptors of the proxy itself: log, pipes, standard ones, spare. */
	DESCRIPTORS_OWN = 24,
	/* Connections served at once unless -m says otherwise. */
	CONNECTIONS = 1000,
	CONNECTIONS_MAX = 500000,
	/* More descriptors are never used, whatever the system allows. */
	DESCRIPTORS_MAX = 1000000,
	/* Processes that serve, and the fewest clients that each takes. */
	WORKERS_MAX = 64,
	WORKER_CLIENTS = 8,
	/* Bytes that a tunnel keeps for the log: in all, and of its SNI. */
	NOTE_MAX = 112,
	NOTE_SNI = 40,
	/* An address as text: brackets, 45 characters, scope, port. */
	ADDRESS_TEXT = 80,
	/* The details of a refusal, for the page and Proxy-Status. */
	DETAIL_MAX = 512,
	DAY_S = 86400,
	/* The most that the cache takes unless -s says otherwise: MiB. */
	CACHE_MIB = 256,
	/* A path below the cache directory: 2 and 30 hex digits. */
	ENTRY_PATH = 40,
	/* How often -e and -f may be given, or another such option. */
	SOURCES_MAX = 64,
	/* Rules that rewrite requests, and rules that rewrite responses. */
	REWRITES_MAX = 64,
	/* A user's name or password: RFC 1929 has one length byte. */
	CREDENTIAL_MAX = 255
};

/* ---- 2. Vocabulary ---- */

/*
 * The nouns that several sections share, and the variables of the program.
 * There is no code here.
 *
 * Door: everything here.
 */

/* Bytes that something else owns: mostly a slice of a head. */
struct text {
	const char *at; /* not a string: no NUL ends it */
	size_t len;     /* in bytes */
};

/* An address and port. */
struct address {
	uint16_t family; /* AF_INET, AF_INET6, AF_UNIX; 0: no address */
	uint16_t port;   /* in host order */
	uint32_t scope;  /* of an IPv6 link-local address */
	unsigned char octets[16]; /* in network order; IPv4 uses four */
};

/* What comes from a pool begins with its place in the list of free ones. */
struct pooled {
	struct pooled *next;
};

/* Bytes that wait: data[start] up to data[end]. */
struct buffer {
	struct pooled pooled;
	size_t start, end; /* positions of the bytes in data */
	size_t overflow;   /* bytes that did not fit; sticky */
	char data[BUFFER_ROOM];
};

/* The use of a descriptor: says what the loop does after an event. */
enum role {
	ROLE_OWN,    /* a listener, or a pipe of the proxy's own */
	ROLE_CLIENT, /* the client of an exchange */
	ROLE_SERVER, /* the server of an exchange */
	ROLE_FILE,   /* a file that answers instead: most often an entry */
	ROLE_TRY,    /* another address of the same server, being tried */
	ROLE_KEPT    /* a connection to a server between two exchanges */
};

/* One side of an exchange: a descriptor and the bytes that wait there. */
struct conn {
	int fd;              /* -1: no descriptor, as for an answer in memory */
	int error;           /* errno after which nothing is read, or 0 */
	unsigned place;      /* in the poll set; 0: not in it */
	enum role role;      /* its use */
	uint32_t event;      /* ms modulo 2^32, the last turn with an event */
	uint16_t seen;       /* bytes of `in` searched for the end of a head */
	bool connecting : 1; /* connect(2) is under way */
	bool readable : 1;   /* a read may succeed */
	bool writable : 1;   /* a write may succeed */
	bool wanted : 1;     /* the last step tried to read */
	bool eof : 1;        /* the peer sends no more */
	bool shut : 1;       /* the proxy sends no more */
	bool wrote : 1;      /* bytes have been written */
	bool hurries : 1;    /* no small segment waits for another one */
	bool write_failed : 1; /* a write failed: the peer accepts no more */
	bool hangup : 1; /* poll reported HUP or ERR, or a file: never polled */
	struct exchange *exchange; /* that it belongs to, or NULL */
	struct buffer *in;         /* bytes that arrived and are not used yet */
	struct buffer *out;        /* bytes to be sent; NULL, or not empty */
};

/* How the end of a body is known (RFC 9112 section 6.3). */
enum framing {
	FRAMING_NO_BODY, /* there is no body */
	FRAMING_LENGTH,  /* Content-Length */
	FRAMING_CHUNKED, /* Transfer-Encoding: chunked */
	FRAMING_CLOSE    /* the body ends with the connection */
};

/* The part of a chunked body that the next byte belongs to (RFC 9112 7.1). */
enum chunk {
	CHUNK_SIZE,      /* the hex digits of a size */
	CHUNK_BLANK,     /* blanks behind them; an extension may follow */
	CHUNK_EXTENSION, /* a chunk extension, which is ignored */
	CHUNK_SIZE_LF,   /* the LF that ends the line */
	CHUNK_DATA,      /* payload */
	CHUNK_DATA_CR,   /* the CR behind the payload */
	CHUNK_DATA_LF,   /* the LF behind that */
	CHUNK_TRAILER    /* the trailer section, behind the last chunk */
};

/* The body of one message on its way from one conn to the other. */
struct flow {
	enum framing from, to; /* its framing on arrival and on departure */
	enum chunk chunk;      /* the part that the next byte belongs to */
	unsigned char digits;  /* of the chunk size so far */
	bool whole : 1;        /* the end of the message has arrived */
	bool done : 1;         /* the end of the message has been passed on */
	bool broken : 1;       /* the framing is wrong, or the body truncated */
	bool cut : 1;          /* truncated: the sender stopped too early */
	bool strips : 1;       /* trailer fields are not passed on */
	uint16_t excess;       /* bytes of framing beyond a fair share */
	uint32_t ready;        /* bytes of payload at the front of `in` */
	uint32_t trailer;      /* bytes of trailer section behind, searched */
	uint64_t left;         /* bytes to come, of the body or this chunk */
	uint64_t payload;      /* bytes of payload passed on */
};

/* A field (RFC 9110 section 5.1). */
struct field {
	struct text name;  /* a token */
	struct text value; /* without the blanks around it */
};

/* A field of a parsed head: positions in the head's bytes, and lengths. */
struct place {
	uint16_t name, name_len;
	uint16_t value, value_len;
};

/* Some of the fields of a head: one bit for each. */
struct marks {
	unsigned char bits[(FIELDS_MAX + 7) / 8];
};

/*
 * A head, parsed: slices of the bytes that it came in.  Most heads have few
 * fields: those that are not used are memory that is never touched.
 */
struct head {
	struct text line;       /* the start line */
	const char *at;         /* the bytes that have the fields */
	size_t n;               /* number of fields */
	struct marks nominated; /* by Connection */
	bool nominates_late;    /* it names fields of the trailer, too */
	struct place fields[FIELDS_MAX]; /* in the order of arrival */
};

/* Methods that a proxy treats specially; all others are passed on alike. */
enum method {
	METHOD_OTHER,
	METHOD_GET,
	METHOD_HEAD,
	METHOD_POST,
	METHOD_PUT,
	METHOD_DELETE,
	METHOD_OPTIONS,
	METHOD_TRACE,
	METHOD_CONNECT
};

/* The four forms of a target (RFC 9112 section 3.2). */
enum form {
	FORM_ORIGIN,    /* /path: a request to the proxy itself */
	FORM_ABSOLUTE,  /* http://host/path */
	FORM_AUTHORITY, /* host:port, with CONNECT */
	FORM_ASTERISK   /* *, with OPTIONS */
};

/* The target of a request. */
struct target {
	enum form form;   /* in which it came */
	struct text host; /* without brackets */
	unsigned port;    /* 1 to 65535 */
	struct text path; /* with the query, as it came; may lack its slash */
};

/* Fields that the proxy adds unless rules set or remove them: bits. */
enum own {
	OWN_VIA = 1,
	OWN_DATE = 2,
	OWN_AGE = 4,
	OWN_CACHE_STATUS = 8
};

/* The changes that rules make to a head, see rules_rewrite(). */
struct rewrites {
	struct marks taken; /* fields of the head that are not sent */
	bool strips;        /* rules remove fields: trailers go, too */
	unsigned own;       /* bits of enum own: the proxy adds none */
	bool undecided;     /* rules may change more later */
	size_t n;           /* number of fields that are added */
	const struct field *fields[REWRITES_MAX]; /* sent behind the others */
};

/*
 * Repairs to a server's head: bits.  The head that leaves is written anew, so
 * that no client can read it in another way.
 */
enum mend {
	MEND_LF = 1,       /* LF alone ended a line */
	MEND_BLANK = 2,    /* blanks before a colon */
	MEND_COLON = 4,    /* a line without a colon */
	MEND_IDENTITY = 8, /* Transfer-Encoding: identity */
	MEND_LENGTH = 16,  /* Content-Length beside chunked */
	MEND_OLD = 32,     /* Transfer-Encoding in HTTP/1.0 */
	MENDS = 6          /* number of bits */
};

/* A response head, parsed. */
struct response {
	struct head head;     /* its lines */
	unsigned mended;      /* bits of enum mend */
	int status;           /* 100 to 999 */
	struct text reason;   /* the reason phrase */
	int part;             /* of an entry: see cache_shape() */
	uint64_t first;       /* where a part begins in the body */
	unsigned minor;       /* of HTTP/1.x: 0 or 1 */
	enum framing framing; /* of the body */
	uint64_t length;      /* of the body, with FRAMING_LENGTH */
};

/* Why an exchange failed; the table `refusals` has the words. */
enum refusal {
	REFUSE_NONE,
	REFUSE_BARE_LF,
	REFUSE_CONTROL,
	REFUSE_TLS,
	REFUSE_SOCKS,
	REFUSE_BINARY,
	REFUSE_HTTP2,
	REFUSE_LINE,
	REFUSE_STATUS_LINE,
	REFUSE_METHOD,
	REFUSE_VERSION,
	REFUSE_LINE_LONG,
	REFUSE_HEAD_LONG,
	REFUSE_FIELDS_MANY,
	REFUSE_FIELD,
	REFUSE_COLON,
	REFUSE_FOLDED,
	REFUSE_NO_HOST,
	REFUSE_HOSTS,
	REFUSE_HOST,
	REFUSE_FORM,
	REFUSE_SCHEME,
	REFUSE_USERINFO,
	REFUSE_AUTHORITY,
	REFUSE_PORT,
	REFUSE_NOT_US,
	REFUSE_LENGTH,
	REFUSE_LENGTHS,
	REFUSE_BOTH,
	REFUSE_CODING,
	REFUSE_CODING_TWICE,
	REFUSE_CODING_OLD,
	REFUSE_HOPS,
	REFUSE_CONNECT_BODY,
	REFUSE_BODY,
	REFUSE_BODY_CUT,
	REFUSE_BODY_SLOW,
	REFUSE_SLOW,
	REFUSE_BUSY,
	REFUSE_PAGE,
	REFUSE_PAGE_METHOD,
	REFUSE_CROWDED,
	REFUSE_NAMELESS,
	REFUSE_HEADER_PEER,
	REFUSE_HEADER_NONE,
	REFUSE_HEADER_LINE,
	REFUSE_HEADER_VERSION,
	REFUSE_HEADER_FAMILY,
	REFUSE_HEADER_SHORT,
	REFUSE_HEADER_LONG,
	REFUSE_HEADER_CUT,
	REFUSE_HEADER_SLOW,
	REFUSE_FILE,
	REFUSE_NOT_STORED,
	REFUSE_LOOP_VIA,
	REFUSE_LOOP,
	REFUSE_GUARDED,
	REFUSE_RULE,
	REFUSE_FOREIGN,
	REFUSE_USER,
	REFUSE_PASSWORD,
	REFUSE_NAME,
	REFUSE_NAME_SLOW,
	REFUSE_FAMILY,
	REFUSE_CONNECTION,
	REFUSE_UNREACHABLE,
	REFUSE_CONNECT_SLOW,
	REFUSE_CONNECT,
	REFUSE_CLOSED,
	REFUSE_RESET,
	REFUSE_EARLY,
	REFUSE_ANSWER,
	REFUSE_ANSWER_LONG,
	REFUSE_ANSWER_SLOW,
	REFUSE_REQUEST_UNREAD,
	REFUSE_INTERIM,
	REFUSE_UPGRADE,
	REFUSE_LOGIN,
	REFUSE_PARENT_LOGIN,
	REFUSE_PARENT,
	REFUSE_CUT_SHORT,
	REFUSE_ANSWER_BODY,
	REFUSE_ANSWER_UNREAD,
	REFUSE_IDLE,
	REFUSE_MEMORY,
	REFUSALS
};

/* The cause of a refusal: says what may still be tried. */
enum cause {
	CAUSE_OTHER, /* nothing */
	CAUSE_RULE,  /* a rule decided: nothing */
	CAUSE_WAY,   /* the server can't be reached: try another parent */
	CAUSE_ANSWER /* its answer is wrong: also try a stale entry */
};

/* What ended an exchange; the table `log_ends` has the words for the log. */
enum end {
	END_DONE,   /* the client has all of the response; or: not ended yet */
	END_CLIENT, /* the client closed first */
	END_SERVER, /* the server closed first */
	END_IDLE,   /* idle timeout */
	END_RESET,  /* one side reset its connection */
	END_LIMIT,  /* a limit of the proxy: half-closed time, memory */
	END_RULE,   /* a rule cut it off, or dropped it */
	END_STOP    /* the proxy was told to stop */
};

/* The phases of an exchange; sections 24 and 25 have their steps. */
enum phase {
	PHASE_FREE,     /* no client */
	PHASE_REQUEST,  /* waits for the head of a request */
	PHASE_COLLAPSE, /* waits for the fetch of another exchange */
	PHASE_RESOLVE,  /* looks up the addresses of the server */
	PHASE_CONNECT,  /* connects to one of them */
	PHASE_GREET,    /* shakes hands with a SOCKS5 parent */
	PHASE_RESPONSE, /* sends the request, waits for the response's head */
	PHASE_RELAY,    /* passes on the response, or a tunnel's bytes */
	PHASE_LINGER,   /* is done, waits for the client to close */
	PHASES
};

/* Who answers a request; set by answer_by() only. */
enum answerer {
	ANSWER_NONE,   /* not known yet */
	ANSWER_SERVER, /* a server */
	ANSWER_MEMORY, /* the proxy itself: a page, the 200 to CONNECT */
	ANSWER_ENTRY,  /* a complete entry of the cache */
	ANSWER_FETCH,  /* an entry that another exchange is still storing */
	ANSWER_FAILED, /* such an entry, which is not stored any further */
	ANSWER_AWAITED /* not known: another exchange asks for the same */
};

/* The message of a SOCKS5 parent that comes next. */
enum greeting {
	GREETING_METHOD, /* its choice of a login method */
	GREETING_LOGIN,  /* whether it accepts the login */
	GREETING_REPLY   /* whether it reached the target */
};

/* What the rules say to a request; all zero at its start. */
struct access {
	bool undecided;        /* more must be known to let it pass */
	bool route_undecided;  /* the route needs the server's address */
	bool bent;             /* the rules that bend were judged */
	unsigned found;        /* texts found in the body: bits */
	size_t unjudged;       /* bytes of it since it was last judged */
	struct buffer *answer; /* see access_response() */
};

/* The way of a request to its server; all zero at its start. */
struct route {
	struct parent *parents;     /* those that the rule names, or NULL */
	struct parent *parent;      /* the one in use, or NULL */
	const struct address *from; /* local addresses: IPv4, IPv6; or NULL */
	enum greeting greeting;     /* state of a SOCKS5 handshake */
	int error;                  /* errno of the last address */
	unsigned char n, next;      /* addresses known, addresses tried */
	unsigned char tries;        /* attempts in the table `others` */
	bool reused;                /* the connection has served a request */
	bool fresh;                 /* the connection must be a new one */
	bool keep;                  /* the connection may be used again */
	int64_t tried;              /* ms: the last address was tried */
	/* Of the next hop; for a cache entry, the first is its server's. */
	struct address list[ADDRESSES_MAX];
};

/* What the cache has done for a request; set by caching_enter() only. */
enum caching_state {
	CACHING_NONE,       /* nothing so far */
	CACHING_BYPASSED,   /* nothing, and the answer is not stored */
	CACHING_HIT,        /* an entry answers without validation */
	CACHING_VALIDATES,  /* `entry` is open, the server is asked about it */
	CACHING_VALIDATED,  /* it answers after the server was asked */
	CACHING_SUPERSEDED, /* it was validated and is of no use any more */
};

/* The part of the cache in a request; all zero at its start. */
struct caching {
	enum caching_state state; /* set by caching_enter() only */
	const char *hit;          /* how an entry was used, for the log */
	const char *miss;         /* or why there was none, or `stored` */
	uint64_t stored; /* bytes of the body in the entry being stored */
	/* private to sections 16 and 17 */
	bool collapsed;        /* it waited for a fetch, or reads one */
	struct fetch *fetch;   /* that it leads, or NULL */
	struct fetch *follows; /* that it follows, or NULL */
	int forward_status;    /* the server's, 0: none so far */
	const char *forward;   /* why it was asked (RFC 9211) */
	uint64_t key;          /* hash of the target's key */
	uint64_t validator;    /* see response_validator() */
	int entry;             /* descriptor of the entry to be validated */
	bool outdated;         /* an unsafe request came since the look-up */
	uint32_t region;       /* bytes of the region of one that answers */
	int64_t ttl;           /* seconds the entry is still fresh */
	int64_t age;           /* its age in seconds */
	char path[ENTRY_PATH]; /* name of that to be validated */
};

/* When a request reached each step: ms, 0: not yet. */
struct times {
	int64_t asked;     /* the name lookup began */
	int64_t resolved;  /* the addresses were known */
	int64_t connected; /* the request could be sent */
	int64_t requested; /* the same by the wall clock, in seconds */
	int64_t answered;  /* the response head was complete */
};

/*
 * One request, from its first byte to its line in the log.  It comes from a
 * pool; an idle client and a tunnel have no request.
 */
struct request {
	struct pooled pooled;
	const struct exchange *owner; /* that serves it */
	struct buffer *bytes;         /* its head; all texts point into it */
	struct text name;             /* of the method */
	struct text uri;              /* the target as it came, for the log */
	struct target target;         /* the target, parsed */
	enum method method;       /* METHOD_OTHER for those passed on alike */
	unsigned minor;           /* of HTTP/1.x: 0 or 1 */
	enum framing framing;     /* of the body */
	uint64_t length;          /* of the body, with FRAMING_LENGTH */
	unsigned interims;        /* 1xx responses so far */
	uint64_t dice;            /* a random number; 0: in a trial */
	bool upgrade;             /* the client asked to switch protocols */
	bool kept;                /* it has Connection: keep-alive */
	bool login;               /* it has a login for the connection */
	enum answerer answerer;   /* who answers it */
	uint64_t body;            /* length of the entry that answers */
	uint64_t skip;            /* payload that the client already has */
	struct access access;     /* what the rules say */
	struct route route;       /* the way to the server */
	struct caching caching;   /* the part of the cache */
	struct times times;       /* for the log */
	struct rewrites rewrites; /* changes before it is sent */
	struct head head;         /* last, since most of it is never used */
};

/* What rules do to an exchange; most have none. */
struct bend {
	const struct rule *limit; /* counts it, or NULL */
	const struct rule *cut;   /* cuts its response, or NULL */
	uint64_t left;            /* bytes of the response, until it is cut */
	int64_t delay_ms;         /* before the response; 0: none, or over */
	int64_t until;            /* ms: it waits until then, or 0 */
	uint64_t rate;            /* bytes a second each way, or UINT64_MAX */
	int64_t filled_us[2];     /* when credit was last added: up, down */
	uint64_t credit[2];       /* millionths of bytes that may go at once */
	bool unanswered;          /* no response is ever sent */
	bool answers;             /* a rule has made the response */
	char rules[120];          /* the rules that bend it, for the log */
};

/*
 * What the log says of an exchange.  It stays when the request has gone, as in
 * a tunnel.  To add a field to the log, add a member here, set it where it is
 * known, write it in log_line(), and describe it under LOG in the manual.
 */
struct record {
	int64_t start;              /* ms: the request's first byte came */
	struct address server;      /* in use */
	const struct account *user; /* who has logged in, or NULL */
	const struct rule *rule;    /* that decided, or NULL */
	int status;                 /* sent to the client, 0: none yet */
	enum refusal refusal;       /* why it failed, or REFUSE_NONE */
	enum end end;               /* what ended it */
};

/* What the log says of a tunnel, which has no request: texts, cut. */
struct note {
	int32_t dns_ms, connect_ms; /* durations; -1: no such step */
	unsigned char name, uri, agent, referer; /* lengths, in this order */
	unsigned char sni, sni_len; /* position and length of the SNI */
	unsigned char minor;        /* of the client's HTTP/1.x */
	char text[NOTE_MAX];        /* the texts, one behind the other */
};

/*
 * One slot: a client's connection and the work done for it.  An idle client
 * and a tunnel cost a slot and nothing more.
 */
struct exchange {
	struct exchange *next_again; /* in the list of those to be run */
	bool again;                  /* in that list; also when free */
	enum phase phase;            /* set by exchange_enter() only */
	bool tunnel : 1;             /* it is one, and has no request */
	bool refresh : 1;            /* it has no client: see cache_detach() */
	bool served : 1;             /* the client had a response before */
	bool close : 1;        /* the client's connection ends after this */
	bool local : 1;        /* the client is on this machine */
	bool traced : 1;       /* a rule has it traced */
	bool intercepted : 1;  /* a firewall sent the client here */
	bool unnamed : 1;      /* a PROXY header must name the client first */
	bool hidden : 1;       /* its client speaks TLS: send it no pages */
	uint64_t number;       /* of the request, from its first byte; or 0 */
	int64_t since;         /* ms: the phase began, or a request */
	int64_t moved;         /* ms: the idle timeout runs from then on */
	int64_t deadline;      /* ms: it is run again by then */
	struct exchange *next; /* in the list of free slots */
	struct address peer;   /* of the client */
	struct conn client, server; /* its two sides */
	struct flow up;             /* the request's body, client to server */
	struct flow down;           /* the response's, server to client */
	struct request *request;    /* being served, or NULL */
	struct rules *rules;        /* in force for it, or NULL */
	struct bend *bend;          /* what rules do to it, or NULL */
	struct record record;       /* for its line in the log */
	struct note note;           /* of a tunnel */
};

/* What -w keeps of an exchange. */
enum tape_part {
	TAPE_REQUEST_HEAD,
	TAPE_RESPONSE_HEAD,
	TAPE_REQUEST_BODY,
	TAPE_RESPONSE_BODY,
	TAPE_PARTS
};

/* Who comes to a listener. */
enum arrival {
	ARRIVAL_CLIENT,      /* clients that know the proxy */
	ARRIVAL_INTERCEPTED, /* clients that a firewall sends here */
	ARRIVAL_NAMED        /* peers that name the client in a PROXY header */
};

/* An address on which the proxy listens. */
struct listener {
	struct conn conn;       /* accepts; carries no bytes */
	const char *path;       /* of a UNIX socket, or NULL */
	dev_t device;           /* where its file is */
	ino_t file;             /* which file that is */
	enum arrival arrival;   /* who comes here */
	struct address address; /* that is bound: its port is never 0 */
	bool both;              /* bound to `::', it takes IPv4 clients too */
	bool busy;              /* clients came in the turn before */
};

/* Arguments of an option that may be given often. */
struct strings {
	const char *at[SOURCES_MAX];
	size_t n;
};

/* What the command line says; see option_table. */
static struct {
	struct strings listen; /* each -l */
	struct strings trials; /* each -T */
	const char *cache;     /* the directory, or NULL */
	const char *key;       /* print the entries of this URL, no more */
	uint64_t cache_size;   /* bytes */
	const char *log;       /* NULL or "-": standard output */
	const char *record;    /* record to this file, or NULL */
	const char *user;      /* become this one */
	uid_t uid;             /* who that is */
	gid_t gid;             /* and the group */
	const char *via;       /* the parent of -x, or NULL */
	const char *from[2];   /* connect from these: IPv4, IPv6 */
	uint64_t connections;  /* clients served at once */
	uint64_t workers;      /* processes that serve them */
	uint64_t idle_s;       /* -t, 0: not given */
	int64_t idle_ms;       /* a tunnel or body without a byte */
	uint64_t seed;         /* -S: of what is left to chance */
	/* Options without an argument: how often they were given. */
	unsigned verbose;       /* trace, and dump the payload */
	unsigned anonymous;     /* tell servers nothing */
	unsigned check;         /* check options and rules, no more */
	unsigned inetd;         /* serve standard input, and end */
	unsigned help, version; /* print that and exit */
	char **command;         /* run it, with its arguments; or NULL */
	struct {
		bool line;      /* a rule, not a file of them */
		const char *at; /* it, or its path */
	} sources[SOURCES_MAX]; /* -f and -e in their order */
	unsigned sources_n;     /* how many there were */
} options = { .connections = CONNECTIONS, .workers = 1, .idle_ms = IDLE_MS };

/* The slots; the first connections use the first ones. */
static struct {
	struct exchange *slots;
	size_t n;               /* number of slots */
	size_t used;            /* slots that were ever used, all in front */
	size_t busy;            /* slots with a client now */
	bool crowded;           /* all are busy, and another client waits */
	struct exchange *free;  /* used before, free now */
	struct exchange *again; /* to be run in this turn */
	int64_t wake;           /* ms: the earliest deadline, or earlier */
	uint64_t count;         /* exchanges so far */
} exchanges;

static struct listener listeners[LISTENERS_MAX];
static size_t listeners_n;

static unsigned worker; /* 1 to -j; 0: the only process, or the supervisor */
static int signal_pipe[2] = { -1, -1 };
static int64_t stop_at;    /* ms: draining ends; 0: not told to stop */
static char pseudonym[32]; /* name of the proxy in Via and Proxy-Status */
static char host_name[HOST_MAX + 1]; /* of the machine */

/* ---- 3. Small tools ---- */

/*
 * Numbers, texts, the clock, and messages to the user.  They know nothing of
 * HTTP.
 *
 * Door: everything here.
 */

enum {
	/* Decimal digits of 2^64. */
	NUMBER_DIGITS = 20
};

/* The clocks, read once in each turn of the loop. */
static struct {
	int64_t ms;  /* monotonic: durations and deadlines */
	int64_t us;  /* the same in us: measures a poll, tells turns apart */
	time_t wall; /* dates */
} now;

/*
 * read(2) and its like, repeated if a signal interrupts them: the only code
 * that handles EINTR.  The results are those of the system calls.
 */
static ssize_t
fd_read(int fd, void *to, size_t n)
{
	ssize_t got;

	do
		got = read(fd, to, n);
	while (got == -1 && errno == EINTR);
	return got;
}

/* The same for write(2). */
static ssize_t
fd_write(int fd, const void *from, size_t n)
{
	ssize_t put;

	do
		put = write(fd, from, n);
	while (put == -1 && errno == EINTR);
	return put;
}

/* The same for pwrite(2). */
static ssize_t
fd_write_at(int fd, const void *from, size_t n, off_t offset)
{
	ssize_t put;

	do
		put = pwrite(fd, from, n, offset);
	while (put == -1 && errno == EINTR);
	return put;
}

/*
 * True if fd has one of the events now.  With POLLOUT, it then takes at least
 * _POSIX_PIPE_BUF bytes without blocking; a terminal only if it was opened by
 * terminal_open().
 */
static bool
fd_is_ready(int fd, int events)
{
	struct pollfd poll_fd = { .fd = fd, .events = (short)events };
	int n;

	do
		n = poll(&poll_fd, 1, 0);
	while (n == -1 && errno == EINTR);
	return n == 1;
}

/* The destinations of log and trace. */
static struct {
	int fd;        /* of the log */
	bool syslog;   /* fd is a socket of the system's logger */
	bool regular;  /* fd is a regular file: a write never blocks */
	bool cut;      /* it ends within a line, whose rest waits */
	bool colour;   /* the trace has colours */
	bool terminal; /* standard output or error was one at the start */
	bool quiet;    /* warn() says nothing */
	uint64_t lost; /* lines lost since the last that was written */
} logs = { .fd = STDOUT_FILENO };

/*
 * Writes a line to standard error, as far as that does not block: a reader
 * that stalls must not stop the proxy.
 */
static void
say(const char *line, size_t n)
{
	while (n > 0 && fd_is_ready(STDERR_FILENO, POLLOUT)) {
		size_t piece = n < _POSIX_PIPE_BUF ? n : _POSIX_PIPE_BUF;
		ssize_t put = fd_write(STDERR_FILENO, line, piece);

		if (put <= 0)
			return;
		line += put;
		n -= (size_t)put;
	}
}

/*
 * Writes `proxy: `, the number of a worker, and a message to standard error, as
 * one line.
 */
static void
say_words(const char *format, va_list args)
{
	char line[2048] = "proxy: ";
	size_t start, n;

	if (worker > 0)
		(void)snprintf(line, sizeof(line),
		    "proxy: worker %u: ", worker);
	start = strlen(line);
	(void)vsnprintf(line + start, sizeof(line) - start - 1, format, args);
	n = strlen(line);
	line[n] = '\n';
	say(line, n + 1);
}

/* Ends the program at startup: the system refused something it needs. */
static void
die(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	say_words(format, args);
	va_end(args);
	exit(1);
}

/* The command line is wrong. */
static void
usage(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	say_words(format, args);
	va_end(args);
	fprintf(stderr,
	    "usage: proxy [option ...] [-- command [argument ...]]; "
	    "proxy -h lists the options\n");
	exit(2);
}

/* Writes a message to standard error; serving goes on. */
static void
warn(const char *format, ...)
{
	va_list args;

	if (logs.quiet)
		return;
	va_start(args, format);
	say_words(format, args);
	va_end(args);
}

/*
 * A number that looks random, made of n: the same for the same n.  Not for
 * secrets (the finalizer of SplitMix64).
 */
static uint64_t
random_mix(uint64_t n)
{
	n += UINT64_C(0x9e3779b97f4a7c15);
	n = (n ^ n >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	n = (n ^ n >> 27) * UINT64_C(0x94d049bb133111eb);
	return n ^ n >> 31;
}

/* The earlier of two times. */
static int64_t
least(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

/* What became of an exchange. */
enum result {
	RESULT_HIT,     /* the cache answered */
	RESULT_MISS,    /* a server answered */
	RESULT_TUNNEL,  /* it was a tunnel */
	RESULT_LOCAL,   /* a page of the proxy's own */
	RESULT_REFUSED, /* by the proxy: the request was wrong or forbidden */
	RESULT_FAILED,  /* there was no response, or it was truncated */
	RESULTS
};

/* Upper bounds in ms of how long clients waited for the first byte. */
static const int waits_ms[] = { 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000,
	10000, 30000 };

#define WAITS (sizeof(waits_ms) / sizeof(waits_ms[0]))

/* Sums since the start, and what is in use now: totals_add() adds them up. */
static struct totals {
	uint64_t results[RESULTS];   /* exchanges that have ended */
	uint64_t refusals[REFUSALS]; /* the same, by what the proxy said */
	uint64_t up, down; /* payload in bytes: of requests, of responses */
	uint64_t
	    received[2];  /* bytes on the wire: from clients, from servers */
	uint64_t sent[2]; /* the same: to clients, to servers */
	uint64_t waits[WAITS + 1]; /* responses, by the wait for them */
	uint64_t waited_ms;        /* sum of all waits */
	uint64_t lookups, failed;  /* of names: all, and those that failed */
	uint64_t evicted;          /* entries that gave way to others */
	uint64_t stored;           /* bytes of the disk that the cache takes */
	uint64_t lines_lost;       /* of the log */
	uint64_t busiest;          /* slots in use at once, at most */
	uint64_t busy, slots;      /* slots in use now, and all */
	uint64_t buffers;          /* in use */
	uint64_t descriptors;      /* that are waited for */
	uint64_t names_waiting;    /* for an answer */
} totals;

static int64_t started; /* ms: when the proxy was started */

/* What a worker tells the others, and what the supervisor knows of it. */
struct worker {
	pid_t pid;     /* 0: it is not running */
	unsigned hups; /* SIGHUPs that it has obeyed; see workers_step() */
	int64_t due;   /* ms: it is not started again before */
	struct totals totals; /* as they were after its last turn */
};

static struct worker worker_alone;

/*
 * All workers, in memory that they share.  The first is the supervisor, which
 * serves nobody, or the only process.
 */
static struct worker *workers = &worker_alone;
static size_t workers_n = 1; /* with the supervisor */

/* The monotonic clock in us. */
static int64_t
clock_us(void)
{
	struct timespec monotonic;

	(void)clock_gettime(CLOCK_MONOTONIC, &monotonic);
	return (int64_t)monotonic.tv_sec * 1000000 + monotonic.tv_nsec / 1000;
}

/* Reads both clocks.  Within a turn of the loop, time does not change. */
static void
clock_read(void)
{
	now.us = clock_us();
	now.ms = now.us / 1000;
	now.wall = time(NULL);
}

/* A string as a text; its NUL is not part of it. */
static struct text
text_of(const char *string)
{
	struct text t = { string, strlen(string) };

	return t;
}

/* The n bytes at `at` as a text. */
static struct text
text_cut(const char *at, size_t n)
{
	struct text t = { at, n };

	return t;
}

/* True if t is word, in any case of letters. */
static bool
text_is(struct text t, const char *word)
{
	return strlen(word) == t.len && strncasecmp(t.at, word, t.len) == 0;
}

/* True if t begins with word, in any case of letters. */
static bool
text_starts(struct text t, const char *word)
{
	size_t n = strlen(word);

	return t.len >= n && strncasecmp(t.at, word, n) == 0;
}

/* True if a and b are the same but for the case of letters. */
static bool
text_same(struct text a, struct text b)
{
	return a.len == b.len && strncasecmp(a.at, b.at, a.len) == 0;
}

/* True if a and b are the same, letter by letter. */
static bool
text_equals(struct text a, struct text b)
{
	return a.len == b.len && (a.len == 0 || memcmp(a.at, b.at, a.len) == 0);
}

/* The index of the first c in t, or t.len. */
static size_t
text_find(struct text t, char c)
{
	const char *at = t.len ? memchr(t.at, c, t.len) : NULL;

	return at == NULL ? t.len : (size_t)(at - t.at);
}

/* The part of t in front of the first of those bytes. */
static struct text
text_until(struct text t, const char *bytes)
{
	for (; *bytes != '\0'; bytes++)
		t.len = text_find(t, *bytes);
	return t;
}

/* t without its first n bytes. */
static struct text
text_from(struct text t, size_t n)
{
	return text_cut(t.at + n, t.len - n);
}

/* t without the blanks around it (OWS, RFC 9110 section 5.6.3). */
static struct text
text_trim(struct text t)
{
	while (t.len && (*t.at == ' ' || *t.at == '\t'))
		t = text_from(t, 1);
	while (t.len && (t.at[t.len - 1] == ' ' || t.at[t.len - 1] == '\t'))
		t.len--;
	return t;
}

/* Copies t in lower case to `to`, which has room for it. */
static struct text
text_lower(struct text t, char *to)
{
	size_t i;

	for (i = 0; i < t.len; i++) {
		char c = t.at[i];

		to[i] = c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c;
	}
	return text_cut(to, t.len);
}

/*
 * Copies t to a string of size bytes.  Returns false if it was cut, or has a
 * NUL in it.
 */
static bool
text_copy(struct text t, char *to, size_t size)
{
	size_t n = t.len < size ? t.len : size - 1;

	if (n > 0)
		memcpy(to, t.at, n);
	to[n] = '\0';
	return n == t.len && strlen(to) == n;
}

/* DIGIT of RFC 5234, in any locale. */
static bool
is_digit(char c)
{
	return c >= '0' && c <= '9';
}

/* ALPHA or DIGIT. */
static bool
is_alnum(char c)
{
	return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

/* True if c is among the bytes; NUL is not, though strchr(3) finds it. */
static bool
is_among(char c, const char *bytes)
{
	return c != '\0' && strchr(bytes, c) != NULL;
}

/* tchar of RFC 9110 section 5.6.2. */
static bool
is_token_char(char c)
{
	return is_alnum(c) || is_among(c, "-!#$%&'*+.^_`|~");
}

/* True if t is a token, as methods and field names are. */
static bool
text_is_token(struct text t)
{
	size_t i;

	for (i = 0; i < t.len; i++)
		if (!is_token_char(t.at[i]))
			return false;
	return t.len > 0;
}

/* The value of a hex digit, -1 for any other character. */
static int
hex_value(char c)
{
	if (is_digit(c))
		return c - '0';
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	if (c >= 'A' && c <= 'F')
		return c - 'A' + 10;
	return -1;
}

/*
 * Parses a decimal number from outside: digits only, at most max.  Returns
 * false, and does not change value, for anything else.
 */
static bool
number_parse(struct text t, uint64_t max, uint64_t *value)
{
	uint64_t sum = 0;
	size_t i;

	for (i = 0; i < t.len; i++) {
		uint64_t digit = (uint64_t)(t.at[i] - '0');

		if (!is_digit(t.at[i]) || digit > max ||
		    sum > (max - digit) / 10)
			return false;
		sum = sum * 10 + digit;
	}
	if (t.len == 0)
		return false;
	*value = sum;
	return true;
}

/* The same, but a number that is too large counts as max. */
static bool
number_clamp(struct text t, uint64_t max, uint64_t *value)
{
	size_t i;

	for (i = 0; i < t.len && is_digit(t.at[i]); i++)
		continue;
	if (i < t.len || t.len == 0)
		return false;
	if (!number_parse(t, max, value))
		*value = max;
	return true;
}

/*
 * Writes n in decimal, NUMBER_DIGITS bytes at most and no NUL; returns where
 * it ends.  printf(3) takes ten times as long, and heads and log lines are
 * full of numbers.
 */
static char *
number_print(char *to, uint64_t n)
{
	uint64_t rest = n;
	char *end;

	do
		to++;
	while ((rest /= 10) > 0);
	end = to;
	do
		*--to = (char)('0' + n % 10);
	while ((n /= 10) > 0);
	return end;
}

/*
 * Writes the lowest 4 * n bits of a number as n hex digits and no NUL; returns
 * where they end.
 */
static char *
hex_print(char *to, uint64_t bits, size_t n)
{
	size_t i;

	for (i = n; i > 0; bits >>= 4)
		to[--i] = "0123456789abcdef"[bits & 15];
	return to + n;
}

/* Eight bytes as a number, lowest first; compilers make it one load. */
static uint64_t
word_read(const char *at)
{
	const unsigned char *p = (const unsigned char *)at;

	return (uint64_t)p[0] | (uint64_t)p[1] << 8 | (uint64_t)p[2] << 16 |
	    (uint64_t)p[3] << 24 | (uint64_t)p[4] << 32 | (uint64_t)p[5] << 40 |
	    (uint64_t)p[6] << 48 | (uint64_t)p[7] << 56;
}

/* The same for t of less than eight bytes, padded with zeros. */
static uint64_t
word_last(struct text t)
{
	char bytes[8] = { 0 };

	memcpy(bytes, t.at, t.len);
	return word_read(bytes);
}

/* The 64-bit FNV-1a hash of t, continued from hash. */
static uint64_t
hash_text(uint64_t hash, struct text t)
{
	size_t i;

	for (i = 0; i < t.len; i++)
		hash = (hash ^ (unsigned char)t.at[i]) * 1099511628211U;
	return hash;
}

/* A unit of numbers. */
struct unit {
	char name[4];    /* it follows the number; "": alone */
	uint64_t factor; /* by which the number is multiplied; 0 ends a list */
};

/* Plain numbers. */
static const struct unit units_plain[] = { { "", 1 }, { "", 0 } };

/* Bytes. */
static const struct unit units_size[] = { { "", 1 }, { "k", 1 << 10 },
	{ "m", 1 << 20 }, { "g", 1 << 30 }, { "", 0 } };

/* Parses a number with one of the units, in any case; false if over max. */
static bool
amount_parse(struct text t, const struct unit *units, uint64_t max,
    uint64_t *value)
{
	size_t digits = 0;
	uint64_t count;

	while (digits < t.len && is_digit(t.at[digits]))
		digits++;
	while (units->factor && !text_is(text_from(t, digits), units->name))
		units++;
	if (units->factor == 0 ||
	    !number_parse(text_cut(t.at, digits), max / units->factor, &count))
		return false;
	*value = count * units->factor;
	return true;
}

/* Parses a number of bytes, or of K, M, G. */
static bool
size_parse(struct text t, uint64_t *value)
{
	return amount_parse(t, units_size, INT64_MAX, value);
}

/*
 * Overwrites the logins in all URLs of the n bytes at `at`.  Each is looked for
 * up to the first of the bytes in ends.
 */
static void
secret_hide(char *at, size_t n, const char *ends)
{
	struct text t = text_cut(at, n), login;
	size_t i;

	for (i = 0; i < n; i++) {
		if (!text_starts(text_from(t, i), "://"))
			continue;
		login = text_until(text_from(t, i + strlen("://")), ends);
		while (login.len > 0 && login.at[login.len - 1] != '@')
			login.len--;
		if (login.len > 0)
			memset(at + (login.at - t.at), '*', login.len - 1);
	}
}

/* The same for a rule or an option: only blanks and quotes end a login. */
static void
secret_hide_string(char *string)
{
	secret_hide(string, strlen(string), " \t\"");
}

/*
 * True if both are the same.  The time it takes depends only on the length of
 * a, which the asking side knows.
 */
static bool
secret_same(struct text a, struct text b)
{
	unsigned char differ = a.len != b.len;
	size_t i;

	for (i = 0; i < a.len; i++)
		differ |= (unsigned char)(a.at[i] ^
		    (b.len > 0 ? b.at[i % b.len] : 1));
	return differ == 0;
}

/*
 * The index of the name that t begins with, in any case (RFC 9111 section
 * 4.2), in a list of n names of three letters each; -1 if there is none.
 */
static int
name_index(struct text t, const char *list, int n)
{
	int i;

	for (i = 0; i < n && t.len >= 3; i++, list += 3)
		if (strncasecmp(t.at, list, 3) == 0)
			return i;
	return -1;
}

/*
 * Takes n digits from the front of t, and c, which must follow them ('\0':
 * nothing may follow); -1 if t does not begin so.
 */
static int64_t
digits_next(struct text *t, size_t n, char c)
{
	uint64_t value;

	if (t->len < n + (c != '\0') || (c == '\0' && t->len != n) ||
	    !number_parse(text_cut(t->at, n), 9999, &value) ||
	    (c != '\0' && t->at[n] != c))
		return -1;
	*t = text_from(*t, n + (c != '\0'));
	return (int64_t)value;
}

/* The digits of base64 (RFC 4648 section 4). */
static const char base64[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
			     "abcdefghijklmnopqrstuvwxyz0123456789+/";

/*
 * Encodes the n bytes at `from` in base64, with padding and NUL; `to` has room
 * for (n + 2) / 3 * 4 + 1 bytes.
 */
static void
base64_encode(const char *from, size_t n, char *to)
{
	size_t i, j;

	for (i = 0; i < n; i += 3) {
		unsigned long bits = 0;

		for (j = i; j < i + 3; j++)
			bits = bits << 8 | (j < n ? (unsigned char)from[j] : 0);
		for (j = i; j < i + 4; j++, bits <<= 6)
			*to++ = j <= n ? base64[bits >> 18 & 63] : '=';
	}
	*to = '\0';
}

/*
 * Decodes t into `to`, of size bytes; *n becomes the number of bytes.  False
 * if t is not base64, or too long.
 */
static bool
base64_decode(struct text t, char *to, size_t size, size_t *n)
{
	unsigned long bits = 0;
	const char *digit;
	size_t i;

	while (t.len > 0 && t.at[t.len - 1] == '=')
		t.len--;
	if (t.len % 4 == 1 || t.len / 4 * 3 + 2 > size)
		return false;
	for (i = 0, *n = 0; i < t.len; i++) {
		if (!is_among(t.at[i], base64))
			return false;
		digit = strchr(base64, t.at[i]);
		bits = (bits << 6 | (unsigned long)(digit - base64)) & 0xffffff;
		if (i % 4 > 0)
			to[(*n)++] = (char)(bits >> (6 - i % 4 * 2) & 255);
	}
	return true;
}

/* The colours of the trace: steps, requests, responses. */
enum colour {
	COLOUR_DIM = 2,
	COLOUR_REQUEST = 36,
	COLOUR_RESPONSE = 33
};

/*
 * The start of t as a string, with `.` for what is not safe on a terminal; to
 * has `size` bytes.
 */
static const char *
text_printable(struct text t, char *to, size_t size)
{
	size_t i;

	for (i = 0; i < t.len && i < size - 1; i++)
		to[i] = t.at[i] >= ' ' && t.at[i] <= '~' ? t.at[i] : '.';
	to[i] = '\0';
	return to;
}

/*
 * Writes a line of the trace, coloured on a terminal: mark, at most 900 bytes
 * of t, with dots for those that are not safe on a terminal, and tail.
 */
static void
trace_line(const struct exchange *x, enum colour colour, const char *mark,
    struct text t, const char *tail)
{
	char line[1024], clean[901], start[16] = "";
	int n;

	if (logs.colour)
		(void)snprintf(start, sizeof(start), "\033[%dm", (int)colour);
	n = snprintf(line, sizeof(line), "%s#%llu %s%s%s%s\n", start,
	    (unsigned long long)x->number, mark,
	    text_printable(t, clean, sizeof(clean)), tail,
	    logs.colour ? "\033[0m" : "");
	assert(n > 0 && (size_t)n < sizeof(line));
	say(line, (size_t)n);
}

/* True if the trace shows what is done for x. */
static bool
is_traced(const struct exchange *x)
{
	return options.verbose > 0 || x->traced;
}

/* Traces a step of the exchange, with the milliseconds since its start. */
static void
trace(const struct exchange *x, const char *format, ...)
{
	char text[512];
	va_list args;
	int n;

	if (!is_traced(x))
		return;
	n = snprintf(text, sizeof(text), "* ");
	if (x->record.start)
		n = snprintf(text, sizeof(text), "* %lld ms ",
		    (long long)(now.ms - x->record.start));
	va_start(args, format);
	(void)vsnprintf(text + n, sizeof(text) - (size_t)n, format, args);
	va_end(args);
	trace_line(x, COLOUR_DIM, "", text_of(text), "");
}

/* How a date is written. */
enum date {
	DATE_HTTP,   /* RFC 9110 section 5.6.7 */
	DATE_LOG,    /* in the Common Log Format */
	DATE_SYSLOG, /* as syslog(3) does */
	DATES
};

/* The wall clock as text; valid until the next call for the same form. */
static const char *
date_now(enum date form)
{
	static const char *const formats[DATES] = {
		[DATE_HTTP] = "%a, %d %b %Y %H:%M:%S GMT",
		[DATE_LOG] = "%d/%b/%Y:%H:%M:%S %z",
		[DATE_SYSLOG] = "%b %e %H:%M:%S",
	};
	static char texts[DATES][40];
	static time_t written[DATES];
	struct tm parts, *when;

	if (written[form] == now.wall && texts[form][0] != '\0')
		return texts[form];
	when = form == DATE_HTTP ? gmtime_r(&now.wall, &parts) :
				   localtime_r(&now.wall, &parts);
	if (when != NULL &&
	    strftime(texts[form], sizeof(texts[form]), formats[form], when) > 0)
		written[form] = now.wall;
	return texts[form];
}

/*
 * Zeroed memory that is shared with the processes forked from now on; ends the
 * program if there is none.  POSIX had no MAP_ANONYMOUS before 2024.  Most
 * systems give such memory to those that map /dev/zero.  Elsewhere it is a file
 * that is removed at once; that comes second, as a system may write the pages
 * of a file to the disk again and again.
 */
static void *
memory_share(size_t size)
{
	char name[] = "/tmp/proxy.XXXXXX";
	int fd = open("/dev/zero", O_RDWR), mode = PROT_READ | PROT_WRITE;
	void *at = mmap(NULL, size, mode, MAP_SHARED, fd, 0);

	if (fd != -1)
		(void)close(fd);
	if (at != MAP_FAILED)
		return at;
	fd = mkstemp(name);
	if (fd != -1 && unlink(name) != -1 && ftruncate(fd, (off_t)size) != -1)
		at = mmap(NULL, size, mode, MAP_SHARED, fd, 0);
	if (at == MAP_FAILED)
		die("no memory to share: %s", strerror(errno));
	(void)close(fd);
	return at;
}

/* ---- 4. Buffers and requests ---- */

/*
 * All bytes that wait lie in buffers of one size.  A conn holds a buffer only
 * while bytes wait in it.  Buffers come from one pool, requests from another.
 * A pool's list of free ones is last in, first out, so that a busy proxy uses
 * the same memory again.  Its last few are a reserve: a refusal needs no new
 * memory.
 *
 * Door: everything here.
 */

enum {
	/* Free ones kept for the next use; more go back to the system. */
	POOL_FREE_MAX = 64,
	/* Of these, kept for refusals when the system has no memory. */
	RESERVED = 4
};

/* Memory for things of one size. */
struct pool {
	struct pooled *list; /* the last that was given back is first */
	size_t n;            /* length of the list */
	size_t used;         /* how many are in use */
	size_t size;         /* of each, in bytes */
};

static struct pool buffer_pool = { .size = sizeof(struct buffer) };
static struct pool request_pool = { .size = sizeof(struct request) };

/*
 * Takes from the list as long as it is longer than `keep`, and then from the
 * system; NULL if that has no memory.
 */
static void *
pool_take(struct pool *pool, size_t keep)
{
	struct pooled *taken = pool->list;

	if (pool->n > keep) {
		pool->list = taken->next;
		pool->n--;
	} else {
		taken = malloc(pool->size);
		if (taken == NULL)
			return NULL;
	}
	pool->used++;
	return taken;
}

/* Gives back what pool_take() returned. */
static void
pool_give(struct pool *pool, struct pooled *given)
{
	pool->used--;
	if (pool->n >= POOL_FREE_MAX) {
		free(given);
		return;
	}
	given->next = pool->list;
	pool->list = given;
	pool->n++;
}

/* Fills the reserve at the start; touches little of its memory. */
static void
pool_fill(struct pool *pool)
{
	struct pooled *taken;

	while (pool->n < RESERVED) {
		taken = pool_take(pool, RESERVED);
		if (taken == NULL)
			die("no memory");
		else
			pool_give(pool, taken);
	}
}

/* Empties b, with room for a chunk's size in front. */
static struct buffer *
buffer_clear(struct buffer *b)
{
	b->start = b->end = CHUNK_ROOM;
	b->overflow = 0;
	return b;
}

/* An empty buffer, which the caller owns; NULL if there is no memory. */
static struct buffer *
buffer_take(void)
{
	struct buffer *b = pool_take(&buffer_pool, RESERVED);

	return b == NULL ? NULL : buffer_clear(b);
}

/*
 * The same for a page of the proxy's own, or for bytes that will be dropped:
 * without memory, takes from the reserve.
 */
static struct buffer *
buffer_take_reserved(void)
{
	struct buffer *b = buffer_take();

	if (b == NULL && (b = pool_take(&buffer_pool, 0)) != NULL)
		buffer_clear(b);
	return b;
}

/* Gives *b back, if there is one; *b becomes NULL. */
static void
buffer_give(struct buffer **b)
{
	if (*b != NULL)
		pool_give(&buffer_pool, &(*b)->pooled);
	*b = NULL;
}

/* The number of bytes in b. */
static size_t
buffer_len(const struct buffer *b)
{
	return b->end - b->start;
}

/* The number of bytes in b, which may be NULL. */
static size_t
buffer_held(const struct buffer *b)
{
	return b == NULL ? 0 : buffer_len(b);
}

/* The bytes in b; valid until b is changed. */
static struct text
buffer_text(const struct buffer *b)
{
	return text_cut(b->data + b->start, b->end - b->start);
}

/* The number of bytes that may be appended; the tail stays free. */
static size_t
buffer_room(const struct buffer *b)
{
	return b->end < BUFFER_ROOM - TAIL_ROOM ?
	    BUFFER_ROOM - TAIL_ROOM - b->end :
	    0;
}

/* Appends t whole; if it does not fit, only counts it in overflow. */
static void
buffer_append(struct buffer *b, struct text t)
{
	if (b->overflow || t.len > buffer_room(b)) {
		b->overflow += t.len;
		return;
	}
	if (t.len)
		memcpy(b->data + b->end, t.at, t.len);
	b->end += t.len;
}

/* Appends a string. */
static void
buffer_word(struct buffer *b, const char *word)
{
	buffer_append(b, text_of(word));
}

/* Appends as printf(3) does; what does not fit whole is not appended. */
static void
buffer_print(struct buffer *b, const char *format, ...)
{
	size_t room = buffer_room(b);
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(b->data + b->end, room, format, args);
	va_end(args);
	if (n < 0 || b->overflow || (size_t)n >= room)
		b->overflow += n < 0 ? 1 : (size_t)n;
	else
		b->end += (size_t)n;
}

/* Appends n in decimal. */
static void
buffer_number(struct buffer *b, uint64_t n)
{
	char digits[NUMBER_DIGITS];
	char *end = number_print(digits, n);

	buffer_append(b, text_cut(digits, (size_t)(end - digits)));
}

/* True if c could split or forge a line of the log. */
static bool
is_escaped(char c)
{
	return c < 33 || c > 126 || c == '"' || c == '\\';
}

/*
 * Appends t in at most max bytes; "..." at its end says that it was cut.  Bytes
 * that could split or forge a line become %XX; an empty t becomes "-".  With
 * `blanks`, blanks stay, since the text is in quotes.
 */
static void
buffer_escape(struct buffer *b, struct text t, size_t max, bool blanks)
{
	static const char digits[] = "0123456789ABCDEF";
	size_t i = 0, limit = b->end + max;

	while (i < t.len && b->end + 6 < limit) {
		size_t start = i, room = limit - 6 - b->end;
		char code[3] = "%";

		while (i < t.len && i - start < room &&
		    (!is_escaped(t.at[i]) || (blanks && t.at[i] == ' ')))
			i++;
		buffer_append(b, text_cut(t.at + start, i - start));
		if (i == start) {
			code[1] = digits[(unsigned char)t.at[i] >> 4];
			code[2] = digits[t.at[i++] & 15];
			buffer_append(b, text_cut(code, sizeof(code)));
		}
	}
	if (i < t.len)
		buffer_word(b, "...");
	else if (t.len == 0)
		buffer_word(b, "-");
}

/* Drops the first n bytes. */
static void
buffer_drop(struct buffer *b, size_t n)
{
	assert(n <= buffer_len(b));
	b->start += n;
}

/* Removes n bytes of b that follow the first `at`. */
static void
buffer_cut(struct buffer *b, size_t at, size_t n)
{
	memmove(b->data + b->start + n, b->data + b->start, at);
	b->start += n;
}

/* Drops the first n bytes of *b, and gives it back if those were all. */
static void
buffer_use(struct buffer **b, size_t n)
{
	buffer_drop(*b, n);
	if (buffer_len(*b) == 0)
		buffer_give(b);
}

/* Moves the bytes to the front if there is no room behind them. */
static void
buffer_compact(struct buffer *b)
{
	size_t n = buffer_len(b);

	if (buffer_room(b) > 0 || b->start <= CHUNK_ROOM)
		return;
	memmove(b->data + CHUNK_ROOM, b->data + b->start, n);
	b->start = CHUNK_ROOM;
	b->end = CHUNK_ROOM + n;
}

/*
 * A request of x with nothing in it yet; NULL without memory.  The last `keep`
 * free ones are not taken: those in reserve are for refusals.
 */
static struct request *
request_new(const struct exchange *x, size_t keep)
{
	struct request *q = pool_take(&request_pool, keep);

	if (q == NULL)
		return NULL;
	memset(q, 0, offsetof(struct request, head));
	q->owner = x;
	q->head.n = 0;
	return q;
}

/* Gives *at back with its buffers, if there is one; it becomes NULL. */
static void
request_drop(struct request **at)
{
	struct request *q = *at;

	*at = NULL;
	if (q == NULL)
		return;
	buffer_give(&q->bytes);
	buffer_give(&q->access.answer);
	pool_give(&request_pool, &q->pooled);
}

/* Sets who answers the request of x. */
static void
answer_by(struct exchange *x, enum answerer answerer)
{
	struct request *q = x->request;
	static const char names[][36] = { "nobody yet", "the server",
		"the proxy", "an entry", "a fetch under way",
		"an entry whose fetch has failed", "a fetch, if it stores" };

	if (q->answerer == answerer)
		return;
	q->answerer = answerer;
	trace(x, "to be answered by %s", names[answerer]);
}

/* True if the answer is, or was to be, in the cache. */
static bool
answer_is_stored(const struct request *q)
{
	return q->answerer == ANSWER_ENTRY || q->answerer == ANSWER_FETCH ||
	    q->answerer == ANSWER_FAILED;
}

/* True if no server is asked for the answer, but for its validation. */
static bool
answer_is_local(const struct request *q)
{
	return q->answerer == ANSWER_MEMORY || answer_is_stored(q);
}

/* ---- 5. Conns ---- */

/*
 * The only code that reads, writes, connects, shuts down or closes a
 * connection, and the poll set that says when to.
 *
 * Try first, poll later: `readable` and `writable` say whether a call is
 * likely to succeed.  A short read or write clears them, poll sets them again.
 *
 * The poll set has the recently active descriptors as its prefix, [0, hot).
 * The loop polls the prefix every turn, and the rest in slices from time to
 * time: idle connections cost little while others are busy.
 *
 * Connections without a place in an exchange are in the table `others`: those
 * kept idle for the next request, and further addresses of a server that are
 * tried at the same time.
 *
 * Door: everything here but poll_move and poll_swap.
 */

enum {
	/* Connections outside an exchange: kept idle, or tried in parallel. */
	OTHERS_MAX = 256,
	/* Bytes that fit into one segment: IPv6 guarantees packets of 1280. */
	SEGMENT_MIN = 1220
};

/* Where a connection leads. */
struct hop {
	struct address address;     /* the next hop's */
	struct address from;        /* our end, if a rule says so */
	unsigned parent;            /* id of the parent there; 0: none */
	char beyond[HOST_MAX + 10]; /* host:port behind a SOCKS parent, or "" */
};

/* A connection outside an exchange's own two. */
struct other {
	struct conn conn; /* ROLE_TRY or ROLE_KEPT */
	struct hop hop;   /* where it leads */
	int64_t since_us; /* idle since then; us tell turns apart */
};

/* The poll set: two arrays side by side. */
static struct {
	struct pollfd *fds;  /* what poll(2) is given */
	struct conn **conns; /* whose they are */
	size_t hot;          /* the prefix's end */
	size_t all;          /* the set's end */
	size_t size;         /* room */
} poll_set;

static struct other *others;

static size_t others_n; /* how many there may be */

static size_t others_used; /* those below this one have been used */

/* Makes room for n descriptors.  Place 0 is no conn's. */
static void
poll_set_open(size_t n)
{
	poll_set.fds = malloc((n + 1) * sizeof(struct pollfd));
	poll_set.conns = malloc((n + 1) * sizeof(struct conn *));
	if (poll_set.fds == NULL || poll_set.conns == NULL)
		die("no memory for %lu connections", (unsigned long)n);
	poll_set.size = n + 1;
	poll_set.fds[0] = (struct pollfd){ .fd = -1 };
	poll_set.hot = poll_set.all = 1;
}

/* Moves a descriptor to another place. */
static void
poll_move(size_t from, size_t to)
{
	poll_set.fds[to] = poll_set.fds[from];
	poll_set.conns[to] = poll_set.conns[from];
	poll_set.conns[to]->place = (unsigned)to;
}

/* Swaps two places, by way of place 0. */
static void
poll_swap(size_t a, size_t b)
{
	poll_move(a, 0);
	poll_move(b, a);
	poll_move(0, b);
	poll_set.fds[0] = (struct pollfd){ .fd = -1 };
}

/* Moves c out of the prefix. */
static void
poll_cool(struct conn *c)
{
	assert(c->place < poll_set.hot);
	poll_swap(c->place, --poll_set.hot);
}

/* Removes c from the set, if it is there. */
static void
poll_remove(struct conn *c)
{
	if (c->place == 0)
		return;
	if (c->place < poll_set.hot)
		poll_cool(c);
	poll_move(--poll_set.all, c->place);
	c->place = 0;
}

/*
 * Sets the events to wait for at c, and moves it into the prefix.  If only the
 * other side of its exchange had an event, c may be needed soon.  After a
 * hangup there is nothing to wait for: poll would return at once each time.
 * What is left to read then is found by trying.
 */
static void
conn_watch(struct conn *c, int events)
{
	bool ended;

	if (c->fd == -1 || c->role == ROLE_FILE)
		return;
	if (c->place == 0) {
		assert(poll_set.all < poll_set.size);
		c->place = (unsigned)poll_set.all++;
		poll_set.conns[c->place] = c;
	}
	c->event = (uint32_t)now.ms;
	if (c->place >= poll_set.hot)
		poll_swap(c->place, poll_set.hot++);
	ended = c->hangup || (c->eof && c->shut && events == 0);
	poll_set.fds[c->place] = (struct pollfd){ .fd = ended ? -1 : c->fd,
		.events = (short)events };
}

/*
 * What to wait for at c: room for a write that would block, the end of a
 * connect, and bytes if the last step tried to read.
 */
static int
conn_events(const struct conn *c)
{
	int events = 0;

	if ((c->out != NULL || c->connecting) && !c->writable)
		events |= POLLOUT;
	if (c->wanted && !c->connecting && !c->readable && !c->eof && !c->error)
		events |= POLLIN;
	return events;
}

static int fd_highest; /* of the descriptors that outlive a turn */

/*
 * Records a descriptor, or -1, that is to stay open, and returns it.  The
 * command that the proxy runs does not get it.
 */
static int
fd_note(int fd)
{
	if (fd > fd_highest)
		fd_highest = fd;
	if (fd != -1 && options.command != NULL)
		(void)fcntl(fd, F_SETFD, FD_CLOEXEC);
	return fd;
}

/* Closes *fd unless it is -1, and makes it -1; errno stays. */
static void
fd_drop(int *fd)
{
	int before = errno;

	if (*fd != -1)
		(void)close(*fd);
	*fd = -1;
	errno = before;
}

/* Opens a pipe, and records both ends; false, with errno, if that fails. */
static bool
pipe_open(int fds[2])
{
	if (pipe(fds) == -1)
		return false;
	(void)fd_note(fds[0]);
	(void)fd_note(fds[1]);
	return true;
}

/*
 * In a child process: closes all descriptors but a, b and the standard ones.
 * Otherwise a socket would stay open for its peer, and a removed file would
 * keep its blocks.
 */
static void
fds_close(int a, int b)
{
	int fd;

	for (fd = STDERR_FILENO + 1; fd <= fd_highest; fd++)
		if (fd != a && fd != b)
			(void)close(fd);
}

/*
 * Makes c a conn of fd, which c owns from now on, and which does not block.
 * False, with errno, if that fails; fd is closed then.
 */
static bool
conn_open(struct conn *c, enum role role, int fd, struct exchange *x)
{
	memset(c, 0, sizeof(*c));
	c->fd = fd_note(fd);
	c->role = role;
	c->exchange = x;
	if (fcntl(fd, F_SETFL, O_NONBLOCK) != -1)
		return true;
	fd_drop(&c->fd);
	return false;
}

/* Marks c as unused. */
static void
conn_clear(struct conn *c)
{
	memset(c, 0, sizeof(*c));
	c->fd = -1;
}

/* c, which is closed, takes over fd: a file that answers x. */
static void
conn_file(struct conn *c, int fd, struct exchange *x)
{
	c->fd = fd;
	c->role = ROLE_FILE;
	c->exchange = x;
	c->readable = c->hangup = true;
}

/*
 * Closes c and gives its buffers back.  With reset, the peer gets a TCP reset
 * instead of a FIN, and so knows that something is missing.
 */
static void
conn_close(struct conn *c, bool reset)
{
	struct linger linger = { 1, 0 };

	buffer_give(&c->in);
	buffer_give(&c->out);
	poll_remove(c);
	if (c->fd != -1 && reset)
		(void)setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &linger,
		    sizeof(linger));
	fd_drop(&c->fd);
	conn_clear(c);
}

/* Moves the connection of c and its buffers to `to`; c becomes unused. */
static void
conn_move(struct conn *c, struct conn *to, enum role role, struct exchange *x)
{
	*to = *c;
	to->role = role;
	to->exchange = x;
	if (to->place)
		poll_set.conns[to->place] = to;
	conn_clear(c);
}

/* Half-closes c: the proxy sends no more. */
static void
conn_shut(struct conn *c)
{
	if (!c->shut && c->fd != -1)
		(void)shutdown(c->fd, SHUT_WR);
	c->shut = true;
}

/*
 * Reads once, at most max bytes, and appends them to `in`.  True if bytes, the
 * end or an error came; false if nothing came, or there is no room.
 */
static bool
conn_read_some(struct conn *c, size_t max)
{
	size_t room;
	ssize_t n;

	c->wanted = true;
	if (!c->readable || c->eof || c->error)
		return false;
	if (c->in == NULL && (c->in = buffer_take()) == NULL) {
		c->error = ENOMEM;
		return true;
	}
	buffer_compact(c->in);
	room = buffer_room(c->in);
	if (room > max)
		room = max;
	n = room ? fd_read(c->fd, c->in->data + c->in->end, room) : 0;
	if (n > 0) {
		c->in->end += (size_t)n;
		if (c->role != ROLE_FILE)
			totals.received[c->role == ROLE_SERVER] += (uint64_t)n;
	} else if (n == 0 && room)
		c->eof = true;
	else if (n == -1 && errno != EAGAIN && errno != EWOULDBLOCK)
		c->error = errno;
	if (n < (ssize_t)room && !c->hangup)
		c->readable = false;
	if (buffer_len(c->in) == 0)
		buffer_give(&c->in);
	return n > 0 || c->eof || c->error;
}

/* Reads once, as much as the buffer takes; returns as conn_read_some(). */
static bool
conn_read(struct conn *c)
{
	return conn_read_some(c, BUFFER_ROOM);
}

/*
 * Reads once and drops the bytes; returns as conn_read() does.  It must be
 * possible without memory, as a refusal may be on its way to the client.
 */
static bool
conn_drain(struct conn *c)
{
	bool came;

	buffer_give(&c->in);
	c->in = buffer_take_reserved();
	came = conn_read(c);
	buffer_give(&c->in);
	return came;
}

/*
 * Sees to it that the n bytes to be written leave at once.  Nagle's algorithm
 * keeps a small segment back while another one is on its way, so one write of
 * one segment needs no call.
 */
static void
conn_hurry(struct conn *c, size_t n)
{
	int on = 1;

	if (!c->hurries && (c->wrote || n > SEGMENT_MIN)) {
		(void)setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on,
		    sizeof(on));
		c->hurries = true;
	}
	c->wrote = true;
}

/*
 * Writes as much of `out` as the socket takes.  True if nothing is left, also
 * when the peer no longer accepts data (`write_failed`).  Then reading goes
 * on, as a peer that has gone may have left an answer.  If the system has no
 * memory, the peer is still there and waits: then reading ends, too.
 */
static bool
conn_write(struct conn *c)
{
	ssize_t n;

	if (c->out == NULL)
		return true;
	if (c->fd == -1) {
		buffer_give(&c->out);
		return true;
	}
	if (!c->writable && !c->hangup)
		return false;
	conn_hurry(c, buffer_len(c->out));
	n = fd_write(c->fd, c->out->data + c->out->start, buffer_len(c->out));
	if (n > 0) {
		buffer_drop(c->out, (size_t)n);
		totals.sent[c->role == ROLE_SERVER] += (uint64_t)n;
	} else if (errno != EAGAIN && errno != EWOULDBLOCK) {
		c->write_failed = true;
		if (errno != EPIPE && errno != ECONNRESET)
			c->error = errno;
	}
	if (c->write_failed || buffer_len(c->out) == 0) {
		buffer_give(&c->out);
		return true;
	}
	c->writable = false;
	return false;
}

/* Drops a head of n bytes from the front of `in`. */
static void
conn_drop_head(struct conn *c, size_t n)
{
	buffer_use(&c->in, n);
	c->seen = 0;
}

/*
 * Returns `out`, a new one if there was none; NULL if there is no memory.  Only
 * a page of the proxy's own takes from the reserve on its way to the client.
 */
static struct buffer *
conn_out(struct conn *c)
{
	const struct request *q = c->exchange ? c->exchange->request : NULL;
	bool page = c->role == ROLE_CLIENT && q != NULL &&
	    q->answerer == ANSWER_MEMORY;

	if (c->out == NULL)
		c->out = page ? buffer_take_reserved() : buffer_take();
	return c->out;
}

/* True if nothing reaches the peer any more; bytes from it may be unread. */
static bool
conn_is_gone(const struct conn *c)
{
	return c->error || (c->hangup && !c->shut);
}

/* Converts a to the system's form; returns its length. */
static socklen_t
address_export(const struct address *a, struct sockaddr_storage *to)
{
	struct sockaddr_in *in = (struct sockaddr_in *)to;
	struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)to;

	memset(to, 0, sizeof(*to));
	if (a->family == AF_INET) {
		in->sin_family = AF_INET;
		in->sin_port = htons(a->port);
		memcpy(&in->sin_addr, a->octets, 4);
		return sizeof(*in);
	}
	in6->sin6_family = AF_INET6;
	in6->sin6_port = htons(a->port);
	in6->sin6_scope_id = a->scope;
	memcpy(&in6->sin6_addr, a->octets, 16);
	return sizeof(*in6);
}

/*
 * Makes an IPv4-mapped IPv6 address an IPv4 address, so that rules and
 * comparisons see one form only.
 */
static void
address_unmap(struct address *a)
{
	static const unsigned char mapped[12] = { [10] = 0xff, [11] = 0xff };

	if (a->family != AF_INET6 ||
	    memcmp(a->octets, mapped, sizeof(mapped)) != 0)
		return;
	a->family = AF_INET;
	a->scope = 0;
	memmove(a->octets, a->octets + 12, 4);
	memset(a->octets + 4, 0, 12);
}

/* Converts an address from the system's form. */
static struct address
address_import(const struct sockaddr *from)
{
	const struct sockaddr_in *in = (const struct sockaddr_in *)from;
	const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)from;
	struct address a = { .family = (uint16_t)from->sa_family };

	if (a.family == AF_INET) {
		a.port = ntohs(in->sin_port);
		memcpy(a.octets, &in->sin_addr, 4);
	} else if (a.family == AF_INET6) {
		a.port = ntohs(in6->sin6_port);
		memcpy(a.octets, &in6->sin6_addr, 16);
		a.scope = in6->sin6_scope_id;
	}
	address_unmap(&a);
	return a;
}

/* The address of fd's own end; its family is 0 if there is none. */
static struct address
address_bound(int fd)
{
	struct sockaddr_storage storage;
	socklen_t len = sizeof(storage);

	memset(&storage, 0, sizeof(storage));
	(void)getsockname(fd, (struct sockaddr *)&storage, &len);
	return address_import((struct sockaddr *)&storage);
}

/*
 * True if the peer closed the connection abnormally.  A hangup after the
 * peer's FIN, while the proxy's side is open, means that the peer reset it; at
 * a UNIX socket, only that the peer closed it.
 */
static bool
conn_is_broken(const struct conn *c)
{
	return c->error || (c->write_failed && (c->eof || !c->readable)) ||
	    (c->hangup && c->eof && !c->shut &&
		address_bound(c->fd).family != AF_UNIX);
}

/* Parses a numeric address; false if host is a name. */
static bool
address_parse(struct text host, unsigned port, struct address *a)
{
	char string[INET6_ADDRSTRLEN + 1];
	struct address parsed = { .port = (uint16_t)port };

	if (!text_copy(host, string, sizeof(string)))
		return false;
	if (inet_pton(AF_INET, string, parsed.octets) == 1)
		parsed.family = AF_INET;
	else if (inet_pton(AF_INET6, string, parsed.octets) == 1)
		parsed.family = AF_INET6;
	else
		return false;
	address_unmap(&parsed);
	*a = parsed;
	return true;
}

/*
 * Makes 0.0.0.0 and :: the loopback address: connections to them arrive there,
 * and rules about that address must match them.
 */
static void
address_settle(struct address *a)
{
	static const unsigned char none[16];
	bool six = a->family == AF_INET6;

	if (memcmp(a->octets, none, sizeof(none)) != 0)
		return;
	a->octets[0] = six ? 0 : 127;
	a->octets[six ? 15 : 3] = 1;
}

/*
 * The address that the host of a URL stands for.  It may also be written as
 * resolvers read it: 127.1, 0x7f.0.0.1 and 2130706433 are 127.0.0.1.
 */
static bool
address_of_host(struct text host, unsigned port, struct address *a)
{
	char string[HOST_MAX + 1];
	in_addr_t four;

	if (!address_parse(host, port, a)) {
		if (host.len == 0 || !text_copy(host, string, sizeof(string)))
			return false;
		four = inet_addr(string);
		if (four == (in_addr_t)-1)
			return false;
		*a = (struct address){ .family = AF_INET,
			.port = (uint16_t)port };
		memcpy(a->octets, &four, 4);
	}
	address_settle(a);
	return true;
}

/* An address as text; its first byte is free for a bracket. */
static char address_text[ADDRESS_TEXT];

/* The address without its port; valid until the next call. */
static const char *
address_host(const struct address *a)
{
	char *to = address_text + 1;
	size_t i;

	if (a->family == AF_INET)
		for (i = 0; i < 4; i++) {
			to = number_print(to, a->octets[i]);
			*to++ = i < 3 ? '.' : '\0';
		}
	else if (a->family != AF_INET6 ||
	    inet_ntop(AF_INET6, a->octets, to, INET6_ADDRSTRLEN) == NULL)
		(void)text_copy(text_of(a->family == AF_UNIX ? "unix" : "-"),
		    to, sizeof("unix"));
	return address_text + 1;
}

/* The same with its port; valid until the next call of one of the two. */
static const char *
address_words(const struct address *a)
{
	bool six = a->family == AF_INET6;
	const char *host = address_host(a);
	char *to = address_text + 1 + strlen(host);

	if (!six && a->family != AF_INET)
		return host;
	address_text[0] = '[';
	if (six)
		*to++ = ']';
	*to++ = ':';
	*number_print(to, a->port) = '\0';
	return six ? address_text : host;
}

/* True if family, address and port are the same. */
static bool
address_same(const struct address *a, const struct address *b)
{
	return a->family == b->family && a->port == b->port &&
	    memcmp(a->octets, b->octets, sizeof(a->octets)) == 0;
}

/* True for 127.0.0.0/8 and ::1. */
static bool
address_is_loopback(const struct address *a)
{
	static const unsigned char loopback6[16] = { [15] = 1 };

	if (a->family == AF_INET)
		return a->octets[0] == 127;
	return a->family == AF_INET6 &&
	    memcmp(a->octets, loopback6, sizeof(loopback6)) == 0;
}

/* True for 0.0.0.0/8 and ::, which stand for all addresses of this machine. */
static bool
address_is_any(const struct address *a)
{
	static const unsigned char none[16];

	if (a->family == AF_INET)
		return a->octets[0] == 0;
	return a->family == AF_INET6 &&
	    memcmp(a->octets, none, sizeof(none)) == 0;
}

/* True for an address that only this machine can use. */
static bool
address_is_local(const struct address *a)
{
	return a->family == AF_UNIX || address_is_loopback(a);
}

/*
 * True if the client at the other end of fd is on this machine: then it comes
 * from a UNIX socket or loopback, or from the address that it connected to.
 */
static bool
peer_is_local(int fd, const struct address *peer)
{
	struct address here;

	if (address_is_local(peer))
		return true;
	here = address_bound(fd);
	here.port = peer->port;
	return address_same(&here, peer);
}

/*
 * True if a is an address of this machine: what is sent from it reaches it.
 * The system may let a socket be bound to another's address, from which IPv4
 * then sends nothing.  IPv6 does, but chooses the source by itself: the same
 * address if it is our own.
 */
static bool
address_is_here(const struct address *a)
{
	struct sockaddr_storage storage;
	struct address source = *a;
	int fd = socket(a->family, SOCK_DGRAM, 0);
	socklen_t len;

	source.port = 0;
	len = address_export(&source, &storage);
	source.family = 0;
	if (fd != -1 &&
	    (a->family == AF_INET6 ||
		bind(fd, (struct sockaddr *)&storage, len) != -1)) {
		len = address_export(a, &storage);
		if (connect(fd, (struct sockaddr *)&storage, len) != -1)
			source = address_bound(fd);
	}
	fd_drop(&fd);
	source.port = a->port;
	return address_same(&source, a);
}

/* True if a connection to a would arrive at one of the listeners. */
static bool
address_is_ours(const struct address *a)
{
	size_t i;

	for (i = 0; i < listeners_n; i++) {
		const struct address *l = &listeners[i].address;

		if (l->port != a->port ||
		    (l->family != a->family && !listeners[i].both))
			continue;
		if (address_same(l, a) ||
		    (address_is_any(l) && address_is_here(a)))
			return true;
	}
	return false;
}

/*
 * Begins to connect c to an address, from a local address unless its family
 * is 0.  False, with errno, if it fails at once.
 */
static bool
conn_connect(struct conn *c, const struct address *to,
    const struct address *from)
{
	struct sockaddr_storage storage;
	socklen_t len;
	int fd = socket(to->family, SOCK_STREAM, 0);

	if (fd == -1 || !conn_open(c, ROLE_SERVER, fd, c->exchange))
		return false;
	len = address_export(from, &storage);
	if (from->family == 0 ||
	    bind(fd, (struct sockaddr *)&storage, len) != -1) {
		len = address_export(to, &storage);
		if (connect(fd, (struct sockaddr *)&storage, len) != -1)
			c->writable = true;
		else
			c->connecting = errno == EINPROGRESS || errno == EINTR;
		if (c->writable || c->connecting)
			return true;
	}
	fd_drop(&c->fd);
	return false;
}

/*
 * When c has become writable: 0 if it is connected to that address, or the
 * errno.  poll(2) has told already whether there is an error.  Where nobody
 * listens, the system may choose that port for our end: c is then connected to
 * itself.
 */
static int
conn_connect_error(struct conn *c, const struct address *to)
{
	struct address here = address_bound(c->fd);
	int error = 0;
	socklen_t len = sizeof(error);

	if (c->hangup &&
	    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &len) == -1)
		return errno;
	if (error == 0 && address_same(&here, to))
		error = ECONNREFUSED;
	if (error == 0)
		c->connecting = false;
	return error;
}

/*
 * A free place in `others`, NULL if there is none.  With `needed`, the
 * connection that has been idle longest is closed for it.
 */
static struct other *
other_take(bool needed)
{
	struct other *o, *oldest = NULL;

	for (o = others; o < others + others_used; o++) {
		if (o->conn.fd == -1)
			return o;
		if (o->conn.role == ROLE_KEPT &&
		    (oldest == NULL || o->since_us < oldest->since_us))
			oldest = o;
	}
	if (others_used < others_n) {
		o = &others[others_used++];
		conn_clear(&o->conn);
		return o;
	}
	if (needed && oldest != NULL)
		conn_close(&oldest->conn, false);
	return needed ? oldest : NULL;
}

/*
 * Keeps c, which leads to hop, for the next request that goes there, or closes
 * it if there is no place; c becomes unused.
 */
static void
other_keep(struct conn *c, const struct hop *hop)
{
	struct other *o = other_take(false);

	if (o == NULL) {
		conn_close(c, false);
		return;
	}
	conn_move(c, &o->conn, ROLE_KEPT, NULL);
	o->hop = *hop;
	o->since_us = now.us;
	conn_watch(&o->conn, POLLIN);
	exchanges.wake = least(exchanges.wake, now.ms + KEPT_SERVER_MS);
}

/* The idle connection to hop that was used last, or NULL. */
static struct other *
other_find(const struct hop *hop)
{
	struct other *o, *found = NULL;

	for (o = others; o < others + others_used; o++)
		if (o->conn.fd != -1 && o->conn.role == ROLE_KEPT &&
		    address_same(&o->hop.address, &hop->address) &&
		    address_same(&o->hop.from, &hop->from) &&
		    o->hop.parent == hop->parent &&
		    strcmp(o->hop.beyond, hop->beyond) == 0 &&
		    (found == NULL || o->since_us > found->since_us))
			found = o;
	return found;
}

/*
 * True if nothing came on a kept connection.  poll(2) was asked in this turn
 * about those in the prefix that were kept before.  Bytes that come without a
 * request are no answer (RFC 9112 section 9.2).
 */
static bool
other_is_quiet(const struct other *o)
{
	return (o->conn.place < poll_set.hot && o->since_us < now.us) ||
	    !fd_is_ready(o->conn.fd, POLLIN);
}

/* Puts x into the list of exchanges to be run, if it is not there. */
static void
exchange_queue(struct exchange *x)
{
	if (x->again)
		return;
	x->again = true;
	x->next_again = exchanges.again;
	exchanges.again = x;
}

/* ---- 6. Heads: lines and fields ---- */

/*
 * Finds a whole head, splits it into lines and fields, and reads from them how
 * the body is framed.  Every decision uses this lexer, so that no two parts of
 * the program can read a message differently.  Nothing here reads a
 * connection, changes an exchange or takes memory: bytes in, values out.
 *
 * Parsers return 1 if the input is good, 0 if more bytes are needed or nothing
 * is there, and minus a refusal if it is wrong.
 *
 * Door: field_find, field_name, field_value, fields_parse, head_drop,
 * head_find, head_framing, head_has, head_length, head_lists, head_parse,
 * head_value, line_next, list_next, mark_is_set, mark_set, member_next,
 * refusals, status_reason, text_is_clean, text_split.
 */

/*
 * The refusals.  A new one is a row here, a member of enum refusal, and a call
 * of exchange_refuse(); REFUSALS in the manual has each status and error.
 */
static const struct {
	int status;
	enum cause cause;
	const char *error; /* RFC 9209 section 2.3 */
	const char *words;
} refusals[REFUSALS] = {
#define BAD 400, CAUSE_OTHER, "http_request_error"
#define CLIENT CAUSE_OTHER, "http_request_error"
#define BAD_ANSWER 502, CAUSE_ANSWER, "http_protocol_error"
#define DENIED 403, CAUSE_RULE, "http_request_denied"
#define LOGIN 407, CAUSE_RULE, "http_request_denied"
#define LOOP 508, CAUSE_OTHER, "proxy_loop_detected"
#define UNROUTABLE 502, CAUSE_WAY, "destination_ip_unroutable"
#define ENDED 502, CAUSE_ANSWER, "connection_terminated"
	[REFUSE_BARE_LF] = { BAD, "a line does not end in CR LF" },
	[REFUSE_CONTROL] = { BAD, "a control byte in the head" },
	[REFUSE_TLS] = { BAD,
	    "TLS came where plain HTTP was expected: use http:// for the "
	    "address of the proxy" },
	[REFUSE_SOCKS] = { BAD,
	    "SOCKS came where HTTP was expected: make this an HTTP proxy" },
	[REFUSE_BINARY] = { BAD,
	    "this is not HTTP: a request line was expected" },
	[REFUSE_HTTP2] = { BAD, "HTTP/2 came where HTTP/1.1 was expected" },
	[REFUSE_LINE] = { BAD, "the request line is not METHOD URL HTTP/1.1" },
	[REFUSE_STATUS_LINE] = { BAD_ANSWER,
	    "no status line of HTTP/1 at its start" },
	[REFUSE_METHOD] = { BAD, "the method is not a word" },
	[REFUSE_VERSION] = { 505, CLIENT, "only HTTP/1.0 and 1.1 are spoken" },
	[REFUSE_LINE_LONG] = { 414, CLIENT, "the request line is too long" },
	[REFUSE_HEAD_LONG] = { 431, CLIENT, "the head is too long" },
	[REFUSE_FIELDS_MANY] = { 431, CLIENT, "too many fields in the head" },
	[REFUSE_FIELD] = { BAD, "a field is not name: value" },
	[REFUSE_COLON] = { BAD, "a blank before a field's colon" },
	[REFUSE_FOLDED] = { BAD, "a folded field" },
	[REFUSE_NO_HOST] = { BAD, "HTTP/1.1 without a Host field" },
	[REFUSE_HOSTS] = { BAD, "more than one Host field" },
	[REFUSE_HOST] = { BAD, "the Host field is not host:port" },
	[REFUSE_FORM] = { BAD,
	    "the target's form does not go with the method" },
	[REFUSE_SCHEME] = { 501, CLIENT,
	    "only http:// URLs are fetched; https needs CONNECT" },
	[REFUSE_USERINFO] = { BAD, "a user or password that can't stand here" },
	[REFUSE_AUTHORITY] = { BAD, "no valid host in the URL" },
	[REFUSE_PORT] = { BAD, "the port is not one from 1 to 65535" },
	[REFUSE_NOT_US] = { BAD,
	    "this is a proxy: the request line must hold the whole URL" },
	[REFUSE_LENGTH] = { BAD, "Content-Length is not a number" },
	[REFUSE_LENGTHS] = { BAD, "Content-Lengths that differ" },
	[REFUSE_BOTH] = { BAD, "both Content-Length and Transfer-Encoding" },
	[REFUSE_CODING] = { 501, CLIENT,
	    "a transfer coding other than chunked" },
	[REFUSE_CODING_TWICE] = { BAD,
	    "Transfer-Encoding is not chunked, once, last" },
	[REFUSE_CODING_OLD] = { BAD,
	    "Transfer-Encoding in an HTTP/1.0 request" },
	[REFUSE_HOPS] = { BAD, "Max-Forwards is not a number" },
	[REFUSE_CONNECT_BODY] = { BAD, "a CONNECT with a body" },
	[REFUSE_BODY] = { BAD, "broken chunks in the request body" },
	[REFUSE_BODY_CUT] = { BAD, "the request body was cut short" },
	[REFUSE_BODY_SLOW] = { 408, CLIENT, "the request body stopped coming" },
	[REFUSE_SLOW] = { 408, CLIENT, "the request's head came too slowly" },
	[REFUSE_BUSY] = { 503, CAUSE_OTHER, "connection_limit_reached",
	    "too many names are being looked up" },
	[REFUSE_PAGE] = { 404, CLIENT, "the proxy has no such page" },
	[REFUSE_NAMELESS] = { BAD,
	    "intercepted TLS without the name of a server" },
	[REFUSE_HEADER_PEER] = { DENIED, "no rule trusts this PROXY header" },
	[REFUSE_HEADER_NONE] = { BAD, "a PROXY header was expected" },
	[REFUSE_HEADER_LINE] = { BAD, "a malformed line in a PROXY header" },
	[REFUSE_HEADER_VERSION] = { BAD, "unknown PROXY version or command" },
	[REFUSE_HEADER_FAMILY] = { BAD, "a PROXY header that is not for TCP" },
	[REFUSE_HEADER_SHORT] = { BAD, "a PROXY header without an address" },
	[REFUSE_HEADER_LONG] = { BAD, "the PROXY header is too long" },
	[REFUSE_HEADER_CUT] = { BAD, "the PROXY header was cut short" },
	[REFUSE_HEADER_SLOW] = { 408, CLIENT, "no PROXY header in time" },
	[REFUSE_CROWDED] = { 503, CAUSE_RULE, "http_request_denied",
	    "too many requests of this client at once" },
	[REFUSE_FILE] = { 500, CAUSE_OTHER, "proxy_configuration_error",
	    "the file that a rule answers with can't be read" },
	[REFUSE_PAGE_METHOD] = { 405, CLIENT,
	    "the proxy's own pages allow only GET and HEAD" },
	[REFUSE_NOT_STORED] = { 504, CLIENT,
	    "only the cache may answer, and no entry can be used" },
	[REFUSE_LOOP_VIA] = { LOOP, "this request has passed here before" },
	[REFUSE_LOOP] = { LOOP, "this address is the proxy's own" },
	[REFUSE_GUARDED] = { 403, CAUSE_RULE, "destination_ip_prohibited",
	    "a rule forbids this address" },
	[REFUSE_RULE] = { DENIED, "a rule forbids this" },
	[REFUSE_FOREIGN] = { DENIED, "this client may not use the proxy" },
	[REFUSE_USER] = { LOGIN, "a user and password are needed" },
	[REFUSE_PASSWORD] = { LOGIN, "wrong user or password" },
	[REFUSE_NAME] = { 502, CAUSE_WAY, "dns_error",
	    "the name lookup failed" },
	[REFUSE_NAME_SLOW] = { 504, CAUSE_WAY, "dns_timeout",
	    "the name lookup took too long" },
	[REFUSE_FAMILY] = { UNROUTABLE,
	    "the server has no address in the family of -b or from" },
	[REFUSE_CONNECTION] = { 502, CAUSE_WAY, "connection_refused",
	    "the connection was refused" },
	[REFUSE_UNREACHABLE] = { UNROUTABLE, "the server can't be reached" },
	[REFUSE_CONNECT_SLOW] = { 504, CAUSE_WAY, "connection_timeout",
	    "connecting took too long" },
	[REFUSE_CONNECT] = { 502, CAUSE_WAY, "destination_unavailable",
	    "connecting failed" },
	[REFUSE_CLOSED] = { ENDED, "the server closed without an answer" },
	[REFUSE_RESET] = { ENDED,
	    "the server broke the connection without an answer" },
	[REFUSE_EARLY] = { BAD_ANSWER, "an answer before the request" },
	[REFUSE_ANSWER] = { BAD_ANSWER, "the answer is not valid HTTP" },
	[REFUSE_ANSWER_LONG] = { 502, CAUSE_ANSWER,
	    "http_response_header_section_size",
	    "the answer's head is too long" },
	[REFUSE_ANSWER_SLOW] = { 504, CAUSE_ANSWER, "http_response_timeout",
	    "the server did not answer in time" },
	[REFUSE_REQUEST_UNREAD] = { 504, CAUSE_ANSWER,
	    "connection_write_timeout",
	    "the server stopped reading the request" },
	[REFUSE_INTERIM] = { BAD_ANSWER, "too many interim answers" },
	[REFUSE_UPGRADE] = { 502, CAUSE_ANSWER, "http_upgrade_failed",
	    "a switch of protocols that nobody asked for" },
	[REFUSE_LOGIN] = { BAD_ANSWER,
	    "the server asked for a login as if it were a proxy" },
	[REFUSE_PARENT_LOGIN] = { 502, CAUSE_WAY, "proxy_configuration_error",
	    "the parent proxy does not accept our login" },
	[REFUSE_PARENT] = { 502, CAUSE_WAY, "proxy_internal_response",
	    "the parent proxy failed" },
	[REFUSE_CUT_SHORT] = { 502, CAUSE_ANSWER, "http_response_incomplete",
	    "the answer was cut short" },
	[REFUSE_ANSWER_BODY] = { BAD_ANSWER, "broken chunks in the answer" },
	[REFUSE_ANSWER_UNREAD] = { 504, CAUSE_OTHER, "connection_write_timeout",
	    "the client stopped reading the answer" },
	[REFUSE_IDLE] = { 504, CAUSE_OTHER, "connection_read_timeout",
	    "no byte moved for too long" },
	[REFUSE_MEMORY] = { 503, CAUSE_OTHER, "proxy_internal_error",
	    "out of memory" }
};

/* The reason of a status; empty for others, as RFC 9112 section 4 allows. */
static const char *
status_reason(int status)
{
	static const struct {
		short status;
		char reason[32];
	} reasons[] = {
		{ 200, "OK" },
		{ 204, "No Content" },
		{ 206, "Partial Content" },
		{ 301, "Moved Permanently" },
		{ 302, "Found" },
		{ 304, "Not Modified" },
		{ 400, "Bad Request" },
		{ 401, "Unauthorized" },
		{ 403, "Forbidden" },
		{ 404, "Not Found" },
		{ 405, "Method Not Allowed" },
		{ 407, "Proxy Authentication Required" },
		{ 408, "Request Timeout" },
		{ 410, "Gone" },
		{ 412, "Precondition Failed" },
		{ 414, "URI Too Long" },
		{ 416, "Range Not Satisfiable" },
		{ 426, "Upgrade Required" },
		{ 429, "Too Many Requests" },
		{ 431, "Request Header Fields Too Large" },
		{ 451, "Unavailable For Legal Reasons" },
		{ 500, "Internal Server Error" },
		{ 501, "Not Implemented" },
		{ 502, "Bad Gateway" },
		{ 503, "Service Unavailable" },
		{ 504, "Gateway Timeout" },
		{ 505, "HTTP Version Not Supported" },
		{ 508, "Loop Detected" },
	};
	size_t i;

	for (i = 0; i < sizeof(reasons) / sizeof(reasons[0]); i++)
		if (reasons[i].status == status)
			return reasons[i].reason;
	return "";
}

/*
 * Looks for the end of a head, an empty line; *seen is how many bytes were
 * searched before.  Returns the length of the head with that line, 0 if it is
 * not there yet, or minus a refusal.  Every line of a client must end in CR LF,
 * though RFC 9112 section 2.2 would allow LF: two ways to read a head are one
 * too many.  Lines of a server may end in LF (lenient).
 */
static int
head_find(struct text t, size_t *seen, bool lenient)
{
	while (*seen < t.len) {
		size_t i = *seen + text_find(text_from(t, *seen), '\n');

		*seen = i < t.len ? i + 1 : i;
		if (i == t.len)
			break;
		if (i > 0 && t.at[i - 1] == '\r')
			i--;
		else if (!lenient)
			return -REFUSE_BARE_LF;
		if (i == 0 || t.at[i - 1] == '\n')
			return (int)*seen;
	}
	return 0;
}

/* The bytes of *rest in front of the first c; *rest goes on behind that. */
static struct text
text_split(struct text *rest, char c)
{
	size_t n = text_find(*rest, c);
	struct text piece = text_cut(rest->at, n);

	*rest = text_from(*rest, n < rest->len ? n + 1 : n);
	return piece;
}

/*
 * The next line of *rest without its CR LF or LF; *rest goes on behind it.  If
 * mended is not NULL, a line that ends in LF alone is noted there.
 */
static struct text
line_next(struct text *rest, unsigned *mended)
{
	struct text line = text_split(rest, '\n');

	if (line.len > 0 && line.at[line.len - 1] == '\r')
		line.len--;
	else if (mended != NULL)
		*mended |= MEND_LF;
	return line;
}

/* True if t has no control bytes but tabs. */
static bool
text_is_clean(struct text t)
{
	size_t i;

	for (i = 0; i < t.len; i++)
		if (((unsigned char)t.at[i] < ' ' && t.at[i] != '\t') ||
		    t.at[i] == 0x7f)
			return false;
	return true;
}

/* Adds a field, which is a part of the bytes of h; there is room for it. */
static void
head_add(struct head *h, struct text name, struct text value)
{
	struct place *place = &h->fields[h->n++];

	place->name = (uint16_t)(name.at - h->at);
	place->name_len = (uint16_t)name.len;
	place->value = (uint16_t)(value.at - h->at);
	place->value_len = (uint16_t)value.len;
}

/*
 * Reads a field line (RFC 9112 section 5) and adds the field to h.  Returns 1
 * or minus a refusal.  Repairs, and that the line was dropped, are noted in
 * mended; if that is NULL, nothing is repaired.
 */
static int
field_parse(struct text line, struct head *h, unsigned *mended)
{
	size_t colon = text_find(line, ':');
	struct text name = text_trim(text_cut(line.at, colon));

	if (*line.at == ' ' || *line.at == '\t')
		return -REFUSE_FOLDED;
	if (!text_is_clean(line))
		return -REFUSE_CONTROL;
	if (colon == line.len && mended == NULL)
		return -REFUSE_FIELD;
	if (colon == line.len) {
		*mended |= MEND_COLON;
		return 1;
	}
	if (name.len != colon && mended == NULL)
		return -REFUSE_COLON;
	if (name.len != colon)
		*mended |= MEND_BLANK;
	if (!text_is_token(name))
		return -REFUSE_FIELD;
	if (h->n == FIELDS_MAX)
		return -REFUSE_FIELDS_MANY;
	head_add(h, name, text_trim(text_from(line, colon + 1)));
	return 1;
}

/* The name of field i of h. */
static struct text
field_name(const struct head *h, size_t i)
{
	return text_cut(h->at + h->fields[i].name, h->fields[i].name_len);
}

/* The value of field i of h. */
static struct text
field_value(const struct head *h, size_t i)
{
	return text_cut(h->at + h->fields[i].value, h->fields[i].value_len);
}

/* The first field of that name, from field i on; h->n if there is none. */
static size_t
field_find(const struct head *h, const char *name, size_t i)
{
	struct text wanted = text_of(name);

	while (i < h->n && !text_same(field_name(h, i), wanted))
		i++;
	return i;
}

/* Marks field i. */
static void
mark_set(struct marks *m, size_t i)
{
	m->bits[i / 8] |= (unsigned char)(1U << i % 8);
}

/* True if field i is marked. */
static bool
mark_is_set(const struct marks *m, size_t i)
{
	return m->bits[i / 8] >> i % 8 & 1;
}

/*
 * The next member of a comma-separated list (RFC 9110 section 5.6.1); empty
 * ones are skipped.  False at its end.  A comma in a quoted string does not
 * count.
 */
static bool
list_next(struct text *rest, struct text *member)
{
	do {
		bool quoted = false;
		size_t i;

		for (i = 0; i < rest->len; i++) {
			if (!quoted && rest->at[i] == ',')
				break;
			if (rest->at[i] == '"')
				quoted = !quoted;
			if (quoted && rest->at[i] == '\\' && i + 1 < rest->len)
				i++;
		}
		*member = text_trim(text_cut(rest->at, i));
		*rest = text_from(*rest, i < rest->len ? i + 1 : i);
	} while (member->len == 0 && rest->len > 0);
	return member->len > 0;
}

/* A place among the members of all fields of one name. */
struct members {
	size_t next;      /* the field that is looked at next */
	struct text rest; /* of the value of the one before */
};

/* The next member of the fields of that name; *m is zero at first. */
static bool
member_next(const struct head *h, const char *name, struct members *m,
    struct text *member)
{
	while (!list_next(&m->rest, member)) {
		m->next = field_find(h, name, m->next);
		if (m->next == h->n)
			return false;
		m->rest = field_value(h, m->next++);
	}
	return true;
}

/* Marks the fields of that name as nominated; false if there are none. */
static bool
head_mark(struct head *h, struct text name)
{
	bool found = false;
	size_t i;

	for (i = 0; i < h->n; i++)
		if (text_same(field_name(h, i), name)) {
			mark_set(&h->nominated, i);
			found = true;
		}
	return found;
}

/*
 * Marks the fields that Connection names (RFC 9110 section 7.6.1), once for a
 * head.  False if it names more than a head can have: to look for them all
 * would take too long.
 */
static bool
head_nominate(struct head *h)
{
	struct members m = { 0, { "", 0 } };
	struct text name;
	size_t n;

	memset(&h->nominated, 0, sizeof(h->nominated));
	h->nominates_late = false;
	for (n = 0; member_next(h, "Connection", &m, &name); n++) {
		if (n == FIELDS_MAX)
			return false;
		if (!head_mark(h, name) && !text_is(name, "close") &&
		    !text_is(name, "keep-alive"))
			h->nominates_late = true;
	}
	return true;
}

/* Reads the field lines up to the empty line that ends t; see field_parse(). */
static int
fields_parse(struct text t, struct head *h, unsigned *mended)
{
	struct text line;
	int verdict = 1;

	h->at = t.at;
	h->n = 0;
	while (verdict == 1 && (line = line_next(&t, mended)).len > 0)
		verdict = field_parse(line, h, mended);
	if (verdict == 1 && !head_nominate(h))
		return -REFUSE_FIELDS_MANY;
	return verdict;
}

/* Splits a whole head, as head_find() found it; see field_parse(). */
static int
head_parse(struct text t, struct head *h, unsigned *mended)
{
	h->line = line_next(&t, mended);
	return fields_parse(t, h, mended);
}

/* True if h has a field of that name. */
static bool
head_has(const struct head *h, const char *name)
{
	return field_find(h, name, 0) < h->n;
}

/* The value of the first field of that name; empty if there is no field. */
static struct text
head_value(const struct head *h, const char *name)
{
	size_t i = field_find(h, name, 0);

	return i == h->n ? text_of("") : field_value(h, i);
}

/*
 * Drops the fields of that name; with a value, only those that have it.  True
 * if there were any.
 */
static bool
head_drop(struct head *h, const char *name, const char *value)
{
	size_t i, n = h->n;

	for (h->n = i = 0; i < n; i++)
		if (!text_is(field_name(h, i), name) ||
		    (value != NULL && !text_is(field_value(h, i), value)))
			h->fields[h->n++] = h->fields[i];
	if (h->n < n)
		head_nominate(h);
	return h->n < n;
}

/* True if a field of that name has word as a member of its list. */
static bool
head_lists(const struct head *h, const char *name, struct text word)
{
	struct members m = { 0, { "", 0 } };
	struct text member;

	while (member_next(h, name, &m, &member))
		if (text_same(member, word))
			return true;
	return false;
}

/*
 * Reads Content-Length (RFC 9112 section 6.3, item 5): digits, and one value;
 * equal repeats, in one line or several, count as one.  Empty members are
 * refused, as RFC 9110 section 8.6 allows: the field is not a list.  0: no such
 * field.
 */
static int
head_length(const struct head *h, uint64_t *length)
{
	size_t i = 0;
	int found = 0;

	while ((i = field_find(h, "Content-Length", i)) < h->n) {
		struct text rest = field_value(h, i++);
		uint64_t value;
		bool more;

		do {
			more = text_find(rest, ',') < rest.len;
			if (!number_parse(text_trim(text_split(&rest, ',')),
				INT64_MAX, &value))
				return -REFUSE_LENGTH;
			if (found && value != *length)
				return -REFUSE_LENGTHS;
			*length = value;
			found = 1;
		} while (more);
	}
	return found;
}

/*
 * Reads Transfer-Encoding (RFC 9112 section 6.1): `chunked`, once, and nothing
 * else, since the proxy can't decode more; in one line, as no sender has a
 * reason for two.  Empty members are ignored (RFC 9110 section 5.6.1.2): the
 * next hop gets a field of the proxy's own, and can't read it differently.  0:
 * no such field.
 */
static int
head_chunked(const struct head *h)
{
	static const char name[] = "Transfer-Encoding";
	size_t first = field_find(h, name, 0);
	struct members m = { 0, { "", 0 } };
	struct text coding;
	bool found = member_next(h, name, &m, &coding);

	if (first == h->n)
		return 0;
	if (found && !text_is(coding, "chunked"))
		return text_starts(coding, "chunked") ? -REFUSE_CODING_TWICE :
							-REFUSE_CODING;
	if (field_find(h, name, first + 1) < h->n ||
	    member_next(h, name, &m, &coding))
		return -REFUSE_CODING_TWICE;
	return found ? 1 : -REFUSE_CODING;
}

/*
 * Reads how a head frames its body.  If no field says so, *framing stays: a
 * request then has no body, and a response's goes on to the close.  Both
 * fields at once are how requests are smuggled: that is refused, but from a
 * server (lenient) chunked wins (RFC 9112 section 6.3, item 3).
 */
static int
head_framing(const struct head *h, enum framing *framing, uint64_t *length,
    bool lenient)
{
	int chunked = head_chunked(h);
	int counted = head_length(h, length);

	if (chunked < 0)
		return chunked;
	if (chunked && counted && !lenient)
		return -REFUSE_BOTH;
	if (counted < 0)
		return counted;
	if (chunked || counted)
		*framing = chunked ? FRAMING_CHUNKED : FRAMING_LENGTH;
	return 1;
}

/* ---- 7. Heads: requests and responses ---- */

/*
 * Reads the first line of a head, and the fields that frame or route the
 * message; says which fields pass; and writes the parts of a head.  Parsers
 * return as in section 6.
 *
 * Door: absolute_parse, address_read, authority_parse, authority_print,
 * conn_head, field_append, field_passes, fields_append, fields_not_late,
 * fields_of_body, fields_of_condition, fields_of_hop, head_is_hopeless,
 * head_logs_in, header_parse, host_is_valid, host_trim, line_append,
 * method_parse, name_is_among, number_append, request_clean, request_hopeless,
 * request_is_last, request_mask, request_parse, request_passed_here,
 * response_is_bodiless, response_length, response_parse, status_append,
 * url_login, url_parse, via_append.
 */

/* A host as it may stand in a URL: a name or an address (RFC 3986 3.2.2). */
static bool
host_is_valid(struct text host, bool bracketed)
{
	struct address a;
	size_t i;

	if (host.len == 0 || host.len > HOST_MAX)
		return false;
	if (bracketed)
		return text_find(host, ':') < host.len &&
		    address_parse(host, 0, &a);
	for (i = 0; i < host.len; i++)
		if (!is_alnum(host.at[i]) && !is_among(host.at[i], "-._~"))
			return false;
	return true;
}

/*
 * Reads host[:port] or [IPv6][:port].  Without a port, default_port is taken;
 * if that is 0, the port must be there.
 */
static int
authority_parse(struct text t, unsigned default_port, struct target *target)
{
	bool bracketed = text_starts(t, "[");
	struct text rest = text_from(t, bracketed);
	uint64_t value = default_port;

	if (text_find(t, '@') < t.len)
		return -REFUSE_USERINFO;
	target->host =
	    text_cut(rest.at, text_find(rest, bracketed ? ']' : ':'));
	rest = text_from(rest, target->host.len);
	if (!host_is_valid(target->host, bracketed) ||
	    (bracketed && rest.len == 0))
		return -REFUSE_AUTHORITY;
	rest = text_from(rest, bracketed);
	if (rest.len > 0 && *rest.at != ':')
		return -REFUSE_AUTHORITY;
	if ((rest.len > 1 &&
		!number_parse(text_from(rest, 1), 65535, &value)) ||
	    value == 0)
		return -REFUSE_PORT;
	target->port = (unsigned)value;
	return 1;
}

/*
 * The login in a URL, with the `@` behind it; it is empty if there is no login.
 * It may hold any byte that does not end an authority.
 */
static struct text
url_login(struct text t)
{
	size_t slash = text_find(t, '/');
	struct text login;

	if (slash > 0 && text_starts(text_from(t, slash - 1), "://"))
		t = text_from(t, slash + 2);
	login = text_until(t, "/?");
	while (login.len > 0 && login.at[login.len - 1] != '@')
		login.len--;
	return login;
}

/* Reads authority/path, as in a URL behind `//`.  A fragment is ignored. */
static int
place_parse(struct text t, unsigned default_port, struct target *target)
{
	struct text authority;

	t = text_until(t, "#");
	authority = text_until(t, "/?");
	target->path = text_from(t, authority.len);
	return authority_parse(authority, default_port, target);
}

/*
 * Reads http://authority/path, an absolute URL (RFC 9110 section 4.2.1), or
 * //authority/path, which is relative to such a URL.
 */
static int
absolute_parse(struct text t, struct target *target)
{
	if (text_starts(t, "http:"))
		t = text_from(t, strlen("http:"));
	if (!text_starts(t, "//"))
		return -REFUSE_SCHEME;
	return place_parse(text_from(t, strlen("//")), 80, target);
}

/*
 * Reads the URL of an option, http or https, and ignores a login in it.  For
 * https the target is that of a CONNECT.  False if it is not such a URL.
 */
static bool
url_parse(struct text url, struct target *target)
{
	struct text login = url_login(url);
	bool tls = text_starts(url, "https://");

	if (!text_is_clean(url) || (!tls && !text_starts(url, "http://")))
		return false;
	url = text_from(url, (size_t)(login.at + login.len - url.at));
	if (place_parse(url, tls ? 443 : 80, target) != 1)
		return false;
	target->form = tls ? FORM_AUTHORITY : FORM_ABSOLUTE;
	target->path.len = tls ? 0 : target->path.len;
	return true;
}

/*
 * Reads the target in its four forms (RFC 9112 section 3.2).  Bytes beyond
 * ASCII pass, as clients do send them; blanks and control bytes do not.
 */
static int
target_parse(struct text t, enum method method, struct target *target)
{
	struct text rest = t;

	memset(target, 0, sizeof(*target));
	target->host = target->path = text_cut(t.at, 0);
	if (text_until(t, " \t").len < t.len || !text_is_clean(t))
		return -REFUSE_CONTROL;
	if (method == METHOD_CONNECT) {
		target->form = FORM_AUTHORITY;
		return text_find(t, '/') < t.len ?
		    -REFUSE_FORM :
		    authority_parse(t, 0, target);
	}
	target->path = t;
	if (text_starts(t, "/")) {
		target->form = FORM_ORIGIN;
		return 1;
	}
	if (text_is(t, "*")) {
		target->form = FORM_ASTERISK;
		return method == METHOD_OPTIONS ? 1 : -REFUSE_FORM;
	}
	target->form = FORM_ABSOLUTE;
	while (
	    rest.len > 0 && (is_alnum(*rest.at) || is_among(*rest.at, "+-.")))
		rest = text_from(rest, 1);
	if (rest.len == t.len || !text_starts(rest, "://"))
		return -REFUSE_FORM;
	return absolute_parse(t, target);
}

/* The method of that name; the case of its letters counts (RFC 9110 9.1). */
static enum method
method_parse(struct text t)
{
	static const char methods[][8] = {
		[METHOD_OTHER] = "",
		[METHOD_GET] = "GET",
		[METHOD_HEAD] = "HEAD",
		[METHOD_POST] = "POST",
		[METHOD_PUT] = "PUT",
		[METHOD_DELETE] = "DELETE",
		[METHOD_OPTIONS] = "OPTIONS",
		[METHOD_TRACE] = "TRACE",
		[METHOD_CONNECT] = "CONNECT",
	};
	size_t i = sizeof(methods) / sizeof(methods[0]) - 1;

	while (i > 0 && !text_equals(t, text_of(methods[i])))
		i--;
	return (enum method)i;
}

/* Reads HTTP/1.x (RFC 9112 section 2.3); *minor is 1 for all but HTTP/1.0. */
static int
version_parse(struct text t, unsigned *minor)
{
	if (t.len != 8 || memcmp(t.at, "HTTP/", 5) != 0 || !is_digit(t.at[5]) ||
	    t.at[6] != '.' || !is_digit(t.at[7]))
		return -REFUSE_LINE;
	if (t.at[5] != '1')
		return -REFUSE_VERSION;
	*minor = t.at[7] != '0';
	return 1;
}

/* Reads METHOD SP target SP version: one blank each, no more. */
static int
request_line_parse(struct text line, struct request *r)
{
	struct text rest = line;
	int verdict;

	/* At once: a refused HEAD must get no body, either. */
	r->method = method_parse(text_until(line, " "));
	if (text_is(line, "PRI * HTTP/2.0"))
		return -REFUSE_HTTP2;
	if (!text_is_clean(line))
		return -REFUSE_CONTROL;
	r->name = text_split(&rest, ' ');
	r->uri = text_split(&rest, ' ');
	if (r->uri.len == 0)
		return -REFUSE_LINE;
	verdict = version_parse(rest, &r->minor);
	if (verdict != 1)
		return verdict;
	if (!text_is_token(r->name))
		return -REFUSE_METHOD;
	return target_parse(r->uri, r->method, &r->target);
}

/*
 * Checks Host (RFC 9112 section 3.2): one field with a host or nothing, which
 * only HTTP/1.0 may leave out.
 */
static int
request_host_check(const struct request *r)
{
	const struct head *h = &r->head;
	size_t i = field_find(h, "Host", 0);
	struct target target;

	if (i == h->n)
		return r->minor == 0 ? 1 : -REFUSE_NO_HOST;
	if (h->fields[i].value_len > 0 &&
	    authority_parse(field_value(h, i), 80, &target) != 1)
		return -REFUSE_HOST;
	return field_find(h, "Host", i + 1) == h->n ? 1 : -REFUSE_HOSTS;
}

/* Reads a whole request head.  What is read before a refusal stays in r. */
static int
request_parse(struct text t, struct request *r)
{
	int verdict, line;

	r->method = METHOD_OTHER;
	r->minor = 1;
	r->framing = FRAMING_NO_BODY;
	r->length = 0;
	memset(&r->target, 0, sizeof(r->target));
	verdict = head_parse(t, &r->head, NULL);
	line = request_line_parse(r->head.line, r);
	if (line != 1) {
		r->name = text_cut(t.at, 0);
		r->uri = r->head.line;
		return line;
	}
	if (verdict != 1)
		return verdict;
	if (r->minor == 0 && head_has(&r->head, "Transfer-Encoding"))
		return -REFUSE_CODING_OLD;
	verdict = head_framing(&r->head, &r->framing, &r->length, false);
	if (verdict != 1)
		return verdict;
	if (r->framing == FRAMING_LENGTH && r->length == 0)
		r->framing = FRAMING_NO_BODY;
	if (r->method == METHOD_CONNECT && r->framing != FRAMING_NO_BODY)
		return -REFUSE_CONNECT_BODY;
	return request_host_check(r);
}

/*
 * Reads HTTP/1.x SP status [SP reason].  RFC 9112 section 4 wants the second
 * blank even without a reason; many servers do not send it then.
 */
static int
status_line_parse(struct text line, struct response *r)
{
	struct text rest = line, code;
	uint64_t status;

	if (version_parse(text_split(&rest, ' '), &r->minor) != 1)
		return -REFUSE_STATUS_LINE;
	code = text_split(&rest, ' ');
	if (code.len != 3 || !number_parse(code, 999, &status) ||
	    status < 100 || !text_is_clean(line))
		return -REFUSE_STATUS_LINE;
	r->status = (int)status;
	r->reason = rest;
	return 1;
}

/*
 * True if a response has no body whatever its fields say (RFC 9112 section
 * 6.3, items 1 and 2).
 */
static bool
response_is_bodiless(int status, enum method method)
{
	return method == METHOD_HEAD || status < 200 || status == 204 ||
	    status == 304 || (method == METHOD_CONNECT && status < 300);
}

/*
 * Reads a whole response head; method is that of the request.  Repairs change
 * r->head too; r->mended says which they were.
 */
static int
response_parse(struct text t, enum method method, struct response *r)
{
	int verdict, line;

	r->mended = 0;
	verdict = head_parse(t, &r->head, &r->mended);
	r->status = 0;
	r->length = 0;
	r->part = 0;
	r->framing = FRAMING_NO_BODY;
	line = status_line_parse(r->head.line, r);
	if (line != 1)
		return line;
	if (verdict != 1)
		return verdict;
	if (head_drop(&r->head, "Transfer-Encoding", "identity"))
		r->mended |= MEND_IDENTITY;
	if (!response_is_bodiless(r->status, method)) {
		r->framing = FRAMING_CLOSE;
		verdict = head_framing(&r->head, &r->framing, &r->length, true);
	}
	if (head_has(&r->head, "Transfer-Encoding")) {
		if (head_drop(&r->head, "Content-Length", NULL))
			r->mended |= MEND_LENGTH;
		if (r->minor == 0)
			r->mended |= MEND_OLD;
	}
	return verdict;
}

enum {
	/* Room for a name in a list; lists of pointers would take more. */
	LISTED_NAME = 26
};

/*
 * Fields for one connection only, and those that the proxy writes itself (RFC
 * 9110 section 7.6.1).
 */
static const char fields_of_hop[][LISTED_NAME] = { "Connection",
	"Proxy-Connection", "Keep-Alive", "TE", "Transfer-Encoding", "Upgrade",
	"HTTP2-Settings", "Proxy-Authorization", "Proxy-Authenticate",
	"Proxy-Authentication-Info", "Content-Length", "Host", "" };

/*
 * Fields that frame or route the message, or are for caches, too: Connection
 * can't remove them.
 */
static const char fields_of_route[][LISTED_NAME] = { "Via", "Max-Forwards",
	"Content-Range", "Content-Encoding", "Expect", "Trailer",
	"Cache-Control", "Vary", "Age", "Date", "Expires", "Pragma",
	"Set-Cookie", "" };

/* Fields that a trailer can't bring (RFC 9110 section 6.5.1). */
static const char fields_not_late[][LISTED_NAME] = { "Authorization",
	"Set-Cookie", "Cache-Control", "Content-Encoding", "Content-Type",
	"Content-Range", "Expect", "Max-Forwards", "Trailer", "Via", "Location",
	"Vary", "Age", "Date", "Expires", "Range", "Cookie", "Forwarded",
	"X-Forwarded-For", "If-Match", "If-None-Match", "If-Modified-Since",
	"If-Unmodified-Since", "If-Range", "WWW-Authenticate", "Referer",
	"From", "" };

/* Fields that describe the body, which a 304 does not have. */
static const char fields_of_body[][LISTED_NAME] = { "Content-Length",
	"Content-Encoding", "Content-Type", "Content-Range", "" };

/* A request's conditions; a validation has others in their place. */
static const char fields_of_condition[][LISTED_NAME] = { "If-None-Match",
	"If-Modified-Since", "If-Match", "If-Unmodified-Since", "" };

/*
 * True if list, which ends in "", has name.  Every field of every head is
 * looked up in lists, so the first letters are compared first.
 */
static bool
name_is_among(struct text name, const char (*list)[LISTED_NAME])
{
	/* NOLINTNEXTLINE: rows of a constant table are no garbage. */
	for (; **list != '\0' && name.len > 0; list++)
		if (((name.at[0] ^ **list) & ~('a' ^ 'A')) == 0 &&
		    text_is(name, *list))
			return true;
	return false;
}

/* True if field i of h may pass on to the next hop. */
static bool
field_passes(const struct head *h, size_t i)
{
	struct text name = field_name(h, i);

	if (name_is_among(name, fields_of_hop))
		return false;
	return !mark_is_set(&h->nominated, i) ||
	    name_is_among(name, fields_of_route);
}

/* Appends a line with a field. */
static void
line_append(struct buffer *b, struct text name, struct text value)
{
	buffer_append(b, name);
	buffer_word(b, ": ");
	buffer_append(b, value);
	buffer_word(b, "\r\n");
}

/* Appends field i of h as a line. */
static void
field_append(struct buffer *b, const struct head *h, size_t i)
{
	line_append(b, field_name(h, i), field_value(h, i));
}

/* Appends the fields of h that `without` does not name, and an empty line. */
static void
fields_append(struct buffer *b, const struct head *h,
    const char (*without)[LISTED_NAME])
{
	size_t i;

	for (i = 0; i < h->n; i++)
		if (!name_is_among(field_name(h, i), without))
			field_append(b, h, i);
	buffer_word(b, "\r\n");
}

/* Appends a status line of HTTP/1.minor; status has three digits. */
static void
status_append(struct buffer *b, unsigned minor, int status, struct text reason)
{
	buffer_word(b, minor ? "HTTP/1.1 " : "HTTP/1.0 ");
	buffer_number(b, (uint64_t)status);
	buffer_word(b, " ");
	buffer_append(b, reason);
	buffer_word(b, "\r\n");
}

/* Appends a field whose value is a number. */
static void
number_append(struct buffer *b, const char *name, uint64_t n)
{
	buffer_word(b, name);
	buffer_word(b, ": ");
	buffer_number(b, n);
	buffer_word(b, "\r\n");
}

/* Appends Via, for a message that came as HTTP/1.minor. */
static void
via_append(struct buffer *b, unsigned minor)
{
	buffer_word(b, minor ? "Via: 1.1 " : "Via: 1.0 ");
	buffer_word(b, pseudonym);
	buffer_word(b, "\r\n");
}

/* A host without the dots at its end. */
static struct text
host_trim(struct text host)
{
	while (host.len > 0 && host.at[host.len - 1] == '.')
		host.len--;
	return host;
}

/*
 * Writes host[:port] as in a URL: port 80 is omitted, except for CONNECT.  `to`
 * has HOST_MAX + 10 bytes.
 */
static void
authority_print(struct text host, unsigned port, bool connect, char *to)
{
	bool literal = text_find(host, ':') < host.len;
	int n = snprintf(to, HOST_MAX + 3, literal ? "[%.*s]" : "%.*s",
	    (int)host.len, host.at);

	if (port != 80 || connect)
		(void)snprintf(to + n, 7, ":%u", port);
}

/* The address that address_words() returned; `-` is one of family 0. */
static struct address
address_read(struct text t)
{
	struct target target;
	struct address a = { .family = 0 };

	if (authority_parse(t, 0, &target) == 1)
		(void)address_parse(target.host, target.port, &a);
	return a;
}

/*
 * The length of a response's body; UINT64_MAX if neither its head nor, for an
 * entry of the cache, the entry says it.
 */
static uint64_t
response_length(const struct response *r)
{
	uint64_t length;

	if (r->framing == FRAMING_LENGTH)
		return r->length;
	return head_length(&r->head, &length) == 1 ? length : UINT64_MAX;
}

/*
 * True if a field of h logs in the connection rather than the request, as NTLM
 * and Negotiate do: then it must not serve another client.
 */
static bool
head_logs_in(const struct head *h, const char *name)
{
	struct members m = { 0, { "", 0 } };
	struct text member;

	while (member_next(h, name, &m, &member))
		if (text_starts(member, "NTLM") ||
		    text_starts(member, "Negotiate"))
			return true;
	return false;
}

/*
 * Looks for the end of the head in c's `in`, which begins behind `skip` bytes.
 * Returns as head_find() does; the length includes those bytes.
 */
static int
conn_head(struct conn *c, size_t skip, bool lenient)
{
	size_t seen = c->seen > skip ? c->seen : skip;
	int n = head_find(buffer_text(c->in), &seen, lenient);

	c->seen = (uint16_t)seen;
	return n;
}

/* The head in front of b can't become whole: no room is left for it. */
static bool
head_is_hopeless(const struct buffer *b)
{
	return buffer_room(b) == 0 && b->start <= CHUNK_ROOM;
}

/*
 * Returns a refusal if the bytes are not HTTP, or too many, else REFUSE_NONE.
 * Other protocols are known by their first byte: they would never send an empty
 * line.
 */
static enum refusal
request_hopeless(const struct buffer *b, bool whole)
{
	struct text t = buffer_text(b);

	if (t.at[0] == 0x16)
		return REFUSE_TLS;
	if (t.at[0] == 4 || t.at[0] == 5)
		return REFUSE_SOCKS;
	if (!is_token_char(t.at[0]) && t.at[0] != '\r')
		return REFUSE_BINARY;
	if (text_find(t, '\n') > LINE_MAX_BYTES + 1)
		return REFUSE_LINE_LONG;
	return !whole && head_is_hopeless(b) ? REFUSE_HEAD_LONG : REFUSE_NONE;
}

/*
 * Takes the login and the fragment out of the URL in the request line that b
 * begins with: they are not for the server (RFC 9110 sections 4.2.4, 7.1),
 * and neither log nor trace may tell the secret.  What is no valid login, or
 * stands in a CONNECT, is overwritten, and the request will be refused.
 */
static void
request_clean(struct buffer *b)
{
	bool connect = text_starts(buffer_text(b), "CONNECT ");
	struct text line = buffer_text(b), login, fragment;
	size_t from, at, i = 0;

	line.len = text_find(line, '\n');
	from = text_until(line, " \t").len;
	from = from < line.len ? from + 1 : 0;
	login = url_login(text_from(line, from));
	at = (size_t)(login.at - line.at);
	while (i < login.len &&
	    (is_alnum(login.at[i]) ||
		is_among(login.at[i], "-._~%!$&'()*+,;=:")))
		i++;
	if (login.len > 0 && (connect || i + 1 < login.len))
		memset(b->data + b->start + at, '*', login.len - 1);
	else {
		buffer_cut(b, at, login.len);
		line = text_from(line, login.len);
	}
	at = from + text_until(text_from(line, from), " #").len;
	fragment = text_until(text_from(line, at), " \r");
	if (!connect && text_starts(fragment, "#") && text_is_clean(fragment))
		buffer_cut(b, at, fragment.len);
}

/*
 * Overwrites what follows the word Authorization in the malformed head in b, on
 * its line and on folded ones: whatever is wrong with the field, its value may
 * be a secret.
 */
static void
request_mask(struct buffer *b)
{
	struct text t = buffer_text(b);
	char *at = b->data + b->start;
	bool hidden = false;
	size_t i;

	for (i = 0; i < t.len; i++) {
		if (hidden && at[i] > ' ' && at[i] != ':')
			at[i] = '*';
		if (text_starts(text_from(t, i), "Authorization")) {
			hidden = true;
			i += strlen("Authorization") - 1;
		} else if (at[i] == '\n')
			hidden = hidden && i + 1 < t.len &&
			    is_among(at[i + 1], " \t");
	}
}

/*
 * Max-Forwards (RFC 9110 section 7.6.2) counts for TRACE and OPTIONS only.
 * Returns 1 if the request ends here, 0 if not, and -refusal if the value is no
 * number; one that is too large counts as the largest.
 */
static int
request_is_last(const struct request *r)
{
	size_t i = field_find(&r->head, "Max-Forwards", 0);
	uint64_t hops;

	if (r->target.form == FORM_ASTERISK)
		return 1;
	if (i == r->head.n ||
	    (r->method != METHOD_TRACE && r->method != METHOD_OPTIONS))
		return 0;
	if (!number_clamp(field_value(&r->head, i), UINT64_MAX, &hops))
		return -REFUSE_HOPS;
	return hops == 0;
}

/* True if our own name is in Via: this request has passed here before. */
static bool
request_passed_here(const struct request *r)
{
	struct members m = { 0, { "", 0 } };
	struct text member, name;

	while (member_next(&r->head, "Via", &m, &member)) {
		(void)text_split(&member, ' ');
		member = text_trim(member);
		name = text_split(&member, ' ');
		if (text_is(name, pseudonym))
			return true;
	}
	return false;
}

enum {
	/* PROXY protocol, section 2.1: the longest line, with CR LF. */
	HEADER_LINE_MAX = 107,
	/* Section 2.2: bytes in front of the addresses. */
	HEADER_FIXED = 16,
	/* Section 2: this much fits into any TCP segment. */
	HEADER_MAX = 536
};

/*
 * Reads the line of a PROXY header, version 1, without its CR LF (section
 * 2.1): addresses of the family that it names, and ports.  Of UNKNOWN the rest
 * is ignored, and `client' stays.  False if the line is malformed.
 */
static bool
header_line(struct text line, struct address *client)
{
	struct text rest = text_from(line, strlen("PROXY ")), words[4];
	struct text family = text_split(&rest, ' ');
	bool six = text_equals(family, text_of("TCP6")), good;
	struct address ends[2];
	uint64_t ports[2];
	size_t i;

	if (text_equals(family, text_of("UNKNOWN")))
		return true;
	good = six || text_equals(family, text_of("TCP4"));
	for (i = 0; i < 4; i++)
		words[i] = i < 3 ? text_split(&rest, ' ') : rest;
	for (i = 0; i < 2 && good; i++)
		good = number_parse(words[i + 2], 65535, &ports[i]) &&
		    (words[i + 2].len == 1 || *words[i + 2].at != '0') &&
		    (text_find(words[i], ':') < words[i].len) == six &&
		    address_parse(words[i], (unsigned)ports[i], &ends[i]);
	if (good)
		*client = ends[0];
	return good;
}

/*
 * Reads a PROXY header of version 2 (section 2.2); its signature is at the
 * start of t.  Returns as header_parse() does.
 */
static int
header_block(struct text t, struct address *client)
{
	const unsigned char *at = (const unsigned char *)t.at;
	struct address a = { .family = 0 };
	size_t len, octets = 0, ports;

	if (t.len < HEADER_FIXED)
		return 0;
	len = HEADER_FIXED + (size_t)at[14] * 256 + at[15];
	if (at[12] != 0x20 && at[12] != 0x21)
		return -REFUSE_HEADER_VERSION;
	if (len > HEADER_MAX)
		return -REFUSE_HEADER_LONG;
	/* LOCAL (0x20), no family and UNIX sockets name no client. */
	if (at[12] == 0x21 && (at[13] == 0x11 || at[13] == 0x21))
		octets = at[13] == 0x11 ? 4 : 16;
	else if (at[12] == 0x21 && at[13] != 0 && at[13] != 0x31)
		return -REFUSE_HEADER_FAMILY;
	/* The client's address, that of the other end, and both ports. */
	ports = HEADER_FIXED + 2 * octets;
	if (octets > 0 && len < ports + 4)
		return -REFUSE_HEADER_SHORT;
	if (t.len < len || octets == 0)
		return t.len < len ? 0 : (int)len;
	a.family = octets == 4 ? AF_INET : AF_INET6;
	a.port = (uint16_t)(at[ports] << 8 | at[ports + 1]);
	memcpy(a.octets, at + HEADER_FIXED, octets);
	address_unmap(&a);
	*client = a;
	return (int)len;
}

/*
 * Reads the PROXY header that t begins with.  Returns its length, 0 if more
 * bytes are needed, or minus a refusal.  `client' becomes the address that the
 * header names, and is unchanged if it names none.  A header that arrives in
 * pieces gets the same verdict: no later byte can change a verdict.
 */
static int
header_parse(struct text t, struct address *client)
{
	static const char signature[] = "\r\n\r\n\0\r\nQUIT\n";
	size_t n = sizeof(signature) - 1, end = text_find(t, '\n');

	if (memcmp(t.at, signature, t.len < n ? t.len : n) == 0)
		return header_block(t, client);
	n = strlen("PROXY ");
	if (memcmp(t.at, "PROXY ", t.len < n ? t.len : n) != 0)
		return -REFUSE_HEADER_NONE;
	if (end >= HEADER_LINE_MAX)
		return -REFUSE_HEADER_LONG;
	if (end == t.len)
		return 0;
	if (t.at[end - 1] != '\r' ||
	    !header_line(text_cut(t.at, end - 1), client))
		return -REFUSE_HEADER_LINE;
	return (int)end + 1;
}

/* ---- 8. Bodies and flows: where a message ends ---- */

/*
 * A body leaves its framing where it arrives and gets a new one where it
 * departs; received framing is never passed on.  Payload is decoded in place:
 * it moves to the front of the buffer in which it arrived, and if a buffer has
 * nothing but payload, the whole buffer changes hands.
 *
 * In `in`: `ready` bytes of payload, then the trailer section, if it is whole,
 * then bytes that are not decoded yet.
 *
 * Door: exchange_parent, flow_decode, flow_encode, flow_start,
 * parent_is_proxy.
 */

enum {
	/* Hex digits of a chunk size: 2^64 - 1 has 16. */
	CHUNK_DIGITS_MAX = 16,
	/* Framing bytes that a body may have beyond a fair share. */
	CHUNK_EXCESS_MAX = BUFFER_SIZE / 2,
	/* The last chunk, and a blank behind the colon of each field. */
	TRAILER_GROWTH = FIELDS_MAX + 8,
	TRAILER_MAX = BUFFER_ROOM - CHUNK_ROOM - TAIL_ROOM - TRAILER_GROWTH
};

/* Begins the flow of one message; length is for FRAMING_LENGTH only. */
static void
flow_start(struct flow *f, enum framing from, enum framing to, uint64_t length)
{
	memset(f, 0, sizeof(*f));
	f->from = from;
	f->to = to;
	f->left = from == FRAMING_LENGTH ? length :
	    from == FRAMING_CLOSE        ? UINT64_MAX :
					   0;
	f->whole = from != FRAMING_CHUNKED && f->left == 0;
	f->done = from == FRAMING_NO_BODY;
}

/*
 * Takes a byte of chunk framing (RFC 9112 section 7.1); false if it is wrong.
 * Each chunk may spend 16 bytes of framing, and two for each byte of payload;
 * all that is more adds up in `excess`, which has a limit, so that extensions
 * can't keep the proxy busy.
 */
static bool
chunk_byte(struct flow *f, char c)
{
	int digit = hex_value(c);
	uint64_t share;

	if (++f->excess > CHUNK_EXCESS_MAX)
		return false;
	if (f->chunk == CHUNK_SIZE && digit >= 0) {
		f->left = f->left << 4 | (uint64_t)digit;
		return ++f->digits <= CHUNK_DIGITS_MAX && f->left <= INT64_MAX;
	}
	switch (f->chunk) {
	case CHUNK_SIZE:
	case CHUNK_BLANK:
		f->chunk = c == '\r' ? CHUNK_SIZE_LF :
		    c == ';'         ? CHUNK_EXTENSION :
				       CHUNK_BLANK;
		return f->digits > 0 && is_among(c, "\r; \t");
	case CHUNK_EXTENSION:
		if (c == '\r')
			f->chunk = CHUNK_SIZE_LF;
		return c == '\r' || c == '\t' || (unsigned char)c >= ' ';
	case CHUNK_SIZE_LF:
		share = f->left == 0           ? 0 :
		    f->left < CHUNK_EXCESS_MAX ? f->left * 2 + 16 :
						 CHUNK_EXCESS_MAX;
		f->excess = f->excess < share ? 0 :
						(uint16_t)(f->excess - share);
		f->chunk = f->left > 0 ? CHUNK_DATA : CHUNK_TRAILER;
		f->digits = 0;
		return c == '\n';
	case CHUNK_DATA_CR:
		f->chunk = CHUNK_DATA_LF;
		return c == '\r';
	case CHUNK_DATA_LF:
		f->chunk = CHUNK_SIZE;
		return c == '\n';
	default:
		return false;
	}
}

/*
 * Takes the trailer section, of which b may have a part only.  An empty one
 * is dropped at once; another stays behind the payload until its turn.
 */
static void
trailer_decode(struct flow *f, struct buffer *b)
{
	struct text t = text_from(buffer_text(b), f->ready);
	size_t seen = f->trailer;
	int n = head_find(t, &seen, false);
	struct head h;

	f->trailer = (uint32_t)seen;
	if (n == 0 && t.len <= TRAILER_MAX)
		return;
	f->trailer = 0;
	f->whole = n > 0 && n <= TRAILER_MAX &&
	    fields_parse(text_cut(t.at, (size_t)n), &h, NULL) == 1;
	f->broken = !f->whole;
	if (n == 2)
		buffer_cut(b, f->ready, 2);
	else if (f->whole)
		f->trailer = (uint32_t)n;
}

/*
 * Takes chunks apart: payload moves to the front, framing is forgotten, and
 * bytes that can't be decoded yet follow the payload.
 */
static void
chunks_decode(struct flow *f, struct buffer *b)
{
	size_t at = b->start + f->ready, n;

	while (at < b->end && f->chunk != CHUNK_TRAILER && !f->broken) {
		if (f->chunk != CHUNK_DATA) {
			f->broken = !chunk_byte(f, b->data[at++]);
			continue;
		}
		n = b->end - at;
		if (n > f->left)
			n = (size_t)f->left;
		if (at != b->start + f->ready)
			memmove(b->data + b->start + f->ready, b->data + at, n);
		f->ready += (uint32_t)n;
		at += n;
		f->left -= n;
		if (f->left == 0)
			f->chunk = CHUNK_DATA_CR;
	}
	n = b->end - at;
	if (n > 0)
		memmove(b->data + b->start + f->ready, b->data + at, n);
	b->end = b->start + f->ready + n;
	if (f->chunk == CHUNK_TRAILER && !f->broken)
		trailer_decode(f, b);
}

/*
 * Takes the framing off the bytes in b (NULL: no bytes).  Sets `whole` at the
 * message's end, `broken` if the framing is wrong, and both `broken` and `cut`
 * if the sender stops (eof) before that end.
 */
static void
flow_decode(struct flow *f, struct buffer *b, bool eof)
{
	size_t raw = b == NULL ? 0 : buffer_len(b) - f->ready;

	if (f->whole || f->broken)
		return;
	if (f->from == FRAMING_CHUNKED) {
		if (b != NULL)
			chunks_decode(f, b);
	} else {
		if (raw > f->left)
			raw = (size_t)f->left;
		f->ready += (uint32_t)raw;
		f->left -= raw;
		f->whole = f->left == 0 || (f->from == FRAMING_CLOSE && eof);
	}
	if (eof && !f->whole) {
		f->cut = !f->broken;
		f->broken = true;
		f->trailer = 0;
	}
}

/* Appends the end of a chunked message, with the trailer fields that pass. */
static void
trailer_encode(struct flow *f, const struct buffer *in, struct buffer *out)
{
	struct head h;
	size_t i;

	buffer_word(out, "0\r\n");
	h.n = 0;
	if (f->trailer > 0 && !f->strips)
		(void)fields_parse(text_cut(in->data + in->start, f->trailer),
		    &h, NULL);
	for (i = 0; i < h.n; i++)
		if (field_passes(&h, i) &&
		    !name_is_among(field_name(&h, i), fields_not_late))
			field_append(out, &h, i);
	buffer_word(out, "\r\n");
}

/* Puts a chunk's framing around all of b, in the room kept for it. */
static void
chunk_wrap(struct buffer *b)
{
	char size[CHUNK_ROOM + 1];
	int n = snprintf(size, sizeof(size), "%lx\r\n",
	    (unsigned long)buffer_len(b));

	assert(n > 0 && (size_t)n <= b->start);
	b->start -= (size_t)n;
	memcpy(b->data + b->start, size, (size_t)n);
	b->data[b->end++] = '\r';
	b->data[b->end++] = '\n';
}

/*
 * Copies n bytes of payload from `in` to an `out` that can't have the whole
 * buffer; returns how many fitted.
 */
static size_t
flow_append(const struct flow *f, size_t n, const struct buffer *in,
    struct buffer *out)
{
	bool chunked = f->to == FRAMING_CHUNKED;
	size_t spare = chunked ? CHUNK_ROOM + 2 : 0;
	size_t room = buffer_room(out);

	if (room <= spare || (n > room - spare && room < BUFFER_ROOM / 2))
		return 0;
	if (n > room - spare)
		n = room - spare;
	if (chunked)
		buffer_print(out, "%lx\r\n", (unsigned long)n);
	buffer_append(out, text_cut(in->data + in->start, n));
	if (chunked)
		buffer_word(out, "\r\n");
	return n;
}

/*
 * Writes the end of a message, once all its payload has moved.  False if it
 * has to wait for `out` to drain.
 */
static bool
flow_end(struct flow *f, struct conn *from, struct conn *to)
{
	assert(f->trailer == 0 || from->in != NULL);
	if (f->to == FRAMING_CHUNKED) {
		if (conn_out(to) == NULL)
			to->error = ENOMEM;
		if (to->out == NULL ||
		    buffer_room(to->out) < f->trailer + TRAILER_GROWTH)
			return false;
		trailer_encode(f, from->in, to->out);
	}
	if (from->in != NULL)
		buffer_use(&from->in, f->trailer);
	f->trailer = 0;
	f->done = true;
	return true;
}

/*
 * Puts the message's new framing on the payload that is ready, at most `most`
 * bytes, and hands it to `to`.  True if anything moved; false if it has to wait
 * for `out` to drain.
 */
static bool
flow_encode(struct flow *f, struct conn *from, struct conn *to, uint64_t most)
{
	size_t n = f->ready < most ? f->ready : (size_t)most;

	if (n > 0 && to->out == NULL && buffer_len(from->in) == n) {
		if (f->to == FRAMING_CHUNKED)
			chunk_wrap(from->in);
		to->out = from->in;
		from->in = NULL;
	} else if (n > 0) {
		if (conn_out(to) == NULL) {
			to->error = ENOMEM;
			return false;
		}
		n = flow_append(f, n, from->in, to->out);
		buffer_use(&from->in, n);
	}
	f->ready -= (uint32_t)n;
	f->payload += n;
	if (f->whole && f->ready == 0 && !f->done && flow_end(f, from, to))
		return true;
	return n > 0;
}

/* ---- the way of a request ---- */

/* How a parent proxy is spoken to. */
enum parent_kind {
	PARENT_NONE,
	PARENT_TO, /* none: a server in place of that in the URL */
	PARENT_HTTP,
	PARENT_SOCKS
};

/* A proxy through which requests leave. */
struct parent {
	struct parent *next;     /* the one to try if this can't be reached */
	unsigned id;             /* no other has had it */
	int64_t failed;          /* ms: when it could not be reached, or 0 */
	enum parent_kind kind;   /* PARENT_NONE: go without one */
	char host[HOST_MAX + 1]; /* a name or an address */
	unsigned port;           /* 1 to 65535 */
	bool login;              /* the next two were given */
	char user[CREDENTIAL_MAX + 1];     /* %XX undone */
	char password[CREDENTIAL_MAX + 1]; /* the same */
};

/* True if it is another proxy. */
static bool
parent_is_proxy(const struct parent *parent)
{
	return parent != NULL &&
	    (parent->kind == PARENT_HTTP || parent->kind == PARENT_SOCKS);
}

/* The parent that an exchange goes through, NULL if none. */
static struct parent *
exchange_parent(const struct exchange *x)
{
	struct parent *parent = x->request->route.parent;

	return parent_is_proxy(parent) ? parent : NULL;
}

/* ---- 9. Matchers and lists of domains ---- */

/*
 * What the values of rules are made of: networks, times, numbers, texts in a
 * stream, and lists of domains as they are downloaded.  Nothing here knows a
 * rule.  A parser that returns false has not changed its result.
 *
 * Door: days_parse, hours_parse, list_end, list_free, list_has, list_step,
 * list_why, needle_scan, network_has, network_parse, numbers_have,
 * numbers_parse, reader_begin, reader_next, span_has, units_time, word_next.
 */

enum {
	/* A domain without a trailing dot, and each of its labels: bytes. */
	DOMAIN_MAX = 253,
	LABEL_MAX = 63,
	/* Bytes in a line of a list of domains, without its LF. */
	LIST_LINE = 1000,
	/* Lines of a list read in one step. */
	LIST_STEP_LINES = 64,
	/* Domains in one list: 1.2 GB. */
	LIST_DOMAINS = 100000000,
	/* Hours without days: all days, and a bit to tell them apart. */
	DAYS_ALL = 255,
	/* Bytes in a rule; its words, each followed by a blank. */
	RULE_LINE_MAX = 8191
};

/* A block of addresses: all that begin with the same bits. */
struct network {
	struct address address; /* without port and scope; other bits are 0 */
	unsigned bits;          /* in the prefix: to 32, or to 128 for IPv6 */
};

/* A part of the week. */
struct span {
	unsigned days; /* on which it begins: bit 0 Sunday to bit 6 Saturday, */
	/* or DAYS_ALL */
	int from; /* its first minute of the day, to 1439 */
	int to;   /* its end, to 1440; below from: past midnight */
};

/* Numbers from first to last. */
struct numbers {
	uint64_t first; /* included */
	uint64_t last;  /* included; not below first */
};

/* The two lowest bits of a slot in a list; the others come from the hash. */
enum list_bit {
	LIST_EXCEPTION = 1, /* the name is not covered, nor any below it */
	LIST_TAKEN = 2      /* set for every name, so that an empty slot is 0 */
};

/* The domains of one file.  Their names are not kept, only hashes. */
struct list {
	uint64_t *slots;   /* open addressing; NULL during the first pass */
	size_t size;       /* number of slots; at least one is empty */
	size_t room;       /* number of names found by the first pass */
	size_t names;      /* found in this pass, with repetitions */
	size_t read;       /* number of lines read in this pass */
	size_t used;       /* number of distinct names, with exceptions */
	size_t skipped;    /* number of lines not understood in full */
	int64_t ms;        /* duration from the first step to the last */
	int64_t begun;     /* us: the time of the first */
	const char *path;  /* of the file */
	const char *where; /* `file:line` of the rule that names it */
	int fd;            /* of the file while it is read, or -1 */
};

/* ---- matchers ---- */

/*
 * Parses an address, optionally followed by a slash and a prefix length.  An
 * IPv4-mapped IPv6 address becomes IPv4, as in address_import(); its prefix
 * must then have at least 96 bits.
 */
static bool
network_parse(struct text t, struct network *n)
{
	size_t slash = text_find(t, '/');
	struct text host = text_cut(t.at, slash);
	bool colons = text_find(host, ':') < host.len;
	uint64_t bits = colons ? 128 : 32;
	struct network block;
	unsigned i;

	if (!address_parse(host, 0, &block.address) ||
	    (slash < t.len &&
		!number_parse(text_from(t, slash + 1), bits, &bits)))
		return false;
	if (colons && block.address.family == AF_INET) {
		if (bits < 96)
			return false;
		bits -= 96;
	}
	block.bits = (unsigned)bits;
	for (i = block.bits; i < 128; i++)
		block.address.octets[i / 8] &= (unsigned char)~(128 >> i % 8);
	*n = block;
	return true;
}

/* True if n contains a; port and scope are ignored. */
static bool
network_has(const struct network *n, const struct address *a)
{
	unsigned whole = n->bits / 8, bits = n->bits % 8;

	return n->address.family == a->family &&
	    memcmp(n->address.octets, a->octets, whole) == 0 &&
	    (bits == 0 ||
		(n->address.octets[whole] ^ a->octets[whole]) >> (8 - bits) ==
		    0);
}

/* 0 for Sunday to 6, or -1 if t is not a day. */
static int
day_index(struct text t)
{
	return t.len == 3 ? name_index(t, "SunMonTueWedThuFriSat", 7) : -1;
}

/* Parses days and ranges of days, which may wrap, separated by commas. */
static bool
days_parse(struct text t, unsigned *days)
{
	unsigned all = 0;
	bool more;

	do {
		struct text range = text_until(t, ",");
		size_t dash = text_find(range, '-');
		int first = day_index(text_cut(range.at, dash));
		int last = dash < range.len ?
		    day_index(text_from(range, dash + 1)) :
		    first;

		if (first == -1 || last == -1)
			return false;
		for (all |= 1U << last; first != last; first = (first + 1) % 7)
			all |= 1U << first;
		more = range.len < t.len;
		(void)text_split(&t, ',');
	} while (more);
	*days = all;
	return true;
}

/* Takes hh:mm and the c after it.  A minute of the day, to 1440, or -1. */
static int
minute_next(struct text *t, char c)
{
	int64_t hour = digits_next(t, 2, ':');
	int64_t minute = digits_next(t, 2, c);

	if (hour < 0 || minute < 0 || minute > 59 || hour * 60 + minute > 1440)
		return -1;
	return (int)(hour * 60 + minute);
}

/* Parses hh:mm-hh:mm: the first minute, and the minute after the last. */
static bool
hours_parse(struct text t, int *from, int *to)
{
	int first = minute_next(&t, '-');
	int end = minute_next(&t, '\0');

	if (first == -1 || end == -1 || first == 1440 || first == end)
		return false;
	*from = first;
	*to = end;
	return true;
}

/*
 * True if `when` is in s.  A range past midnight belongs to the day on
 * which it begins: Fri 22:00-06:00 ends on Saturday.
 */
static bool
span_has(const struct span *s, const struct tm *when)
{
	int minute = when->tm_hour * 60 + when->tm_min;
	bool today = s->days >> when->tm_wday & 1;
	bool yesterday = s->days >> (when->tm_wday + 6) % 7 & 1;

	if (s->from < s->to)
		return today && minute >= s->from && minute < s->to;
	return (today && minute >= s->from) || (yesterday && minute < s->to);
}

/* Durations, in ms. */
static const struct unit units_time[] = { { "", 1000 }, { "ms", 1 },
	{ "s", 1000 }, { "m", 60000 }, { "h", 3600000 }, { "d", 86400000 },
	{ "", 0 } };

/* Parses a number with a unit, or first-last; both at most max. */
static bool
numbers_parse(struct text t, const struct unit *units, uint64_t max,
    struct numbers *r)
{
	size_t dash = text_find(t, '-');
	struct numbers range;

	if (!amount_parse(text_cut(t.at, dash), units, max, &range.first))
		return false;
	range.last = range.first;
	if (dash < t.len &&
	    !amount_parse(text_from(t, dash + 1), units, max, &range.last))
		return false;
	if (range.first > range.last)
		return false;
	*r = range;
	return true;
}

/* True if n is one of the numbers. */
static bool
numbers_have(const struct numbers *r, uint64_t n)
{
	return n >= r->first && n <= r->last;
}

/*
 * How many bytes of the needle match after c; `matched`, fewer than all, did
 * before.  What is left then is a shorter beginning of the needle that is also
 * an end of what matched.
 */
static size_t
needle_step(struct text needle, size_t matched, char c)
{
	size_t n = matched;

	assert(matched < needle.len);
	if (needle.at[matched] == c)
		return matched + 1;
	while (n > 0 &&
	    (needle.at[n - 1] != c ||
		memcmp(needle.at, needle.at + matched + 1 - n, n - 1) != 0))
		n--;
	return n;
}

/*
 * Looks for a needle of 1 to 255 bytes in t, the next bytes of a stream.
 * *state is the caller's: how many bytes of it the stream ends with, 0 at its
 * beginning.  True once it was found, and ever after.
 */
static bool
needle_scan(struct text needle, unsigned char *state, struct text t)
{
	size_t i = 0, matched = *state;

	while (i < t.len && matched < needle.len) {
		if (matched == 0)
			i += text_find(text_from(t, i), needle.at[0]);
		if (i < t.len)
			matched = needle_step(needle, matched, t.at[i++]);
	}
	*state = (unsigned char)matched;
	return matched == needle.len;
}

/* ---- text files ---- */

/* Splits a file into lines. */
struct reader {
	bool begun;                   /* its first line has been read */
	bool eof;                     /* at the end of the file */
	bool cut;                     /* the last line returned has no LF */
	size_t start, end;            /* the bytes left in data */
	char data[RULE_LINE_MAX + 2]; /* a line one too long, with its LF */
};

/* Prepares r for the start of a file. */
static void
reader_begin(struct reader *r)
{
	r->begun = r->eof = r->cut = false;
	r->start = r->end = 0;
}

/*
 * Reads the next line without its LF or CR LF; it is valid until the next call.
 * A line longer than r->data comes in pieces.  A byte order mark, with which
 * some editors begin a file in UTF-8, is dropped.  Returns 1, 0 at the end of
 * the file, or -1 with errno set.
 */
static int
reader_next(struct reader *r, int fd, struct text *line)
{
	struct text t = text_cut(r->data + r->start, r->end - r->start);
	size_t n;

	while ((n = text_find(t, '\n')) == t.len && t.len < sizeof(r->data) &&
	    !r->eof) {
		ssize_t got;

		memmove(r->data, t.at, t.len);
		r->start = 0;
		r->end = t.len;
		got = fd_read(fd, r->data + t.len, sizeof(r->data) - t.len);
		if (got == -1)
			return -1;
		r->eof = got == 0;
		r->end += (size_t)got;
		t = text_cut(r->data, r->end);
	}
	r->cut = n == t.len;
	r->start += n + !r->cut;
	if (!r->begun && text_starts(t, "\xef\xbb\xbf"))
		t = text_from(t, 3);
	r->begun = true;
	*line = line_next(&t, NULL);
	return n > 0 || !r->cut;
}

/* ---- lists of domains ---- */

/*
 * Block lists as they are downloaded: hosts files, a domain on each line,
 * dnsmasq or Adblock lines, also mixed.  A name covers itself and all names
 * below it; an exception overrides every name of its list.  A line that is not
 * understood blocks nothing and is counted: what reads it returns false.  A
 * million domains take 12 MB, since only hashes are kept.  The hash is not
 * secret: all that an attacker gains by a collision is to have a name of their
 * own blocked.
 */

static struct reader list_reader; /* of the list being read */
static char list_why[100];        /* why the last one could not be read */

/*
 * True if t is an address, not a name: it has a colon, or its last label is a
 * number, as no top-level domain is.
 */
static bool
domain_is_numeric(struct text t)
{
	size_t n;
	bool hex;

	if (text_find(t, ':') < t.len)
		return true;
	while (text_find(t, '.') < t.len)
		(void)text_split(&t, '.');
	hex = text_starts(t, "0x");
	for (n = hex ? 2 : 0; n < t.len; n++)
		if (hex ? hex_value(t.at[n]) == -1 : !is_digit(t.at[n]))
			return false;
	return t.len > 0;
}

/* True if t, without a trailing dot, is a name that a list may contain. */
static bool
domain_is_valid(struct text t)
{
	size_t label = 0, i;

	for (i = 0; i < t.len; i++)
		if (t.at[i] == '.') {
			if (label == 0)
				return false;
			label = 0;
		} else if ((!is_alnum(t.at[i]) && !is_among(t.at[i], "-_")) ||
		    ++label > LABEL_MAX)
			return false;
	return label > 0 && t.len <= DOMAIN_MAX && !domain_is_numeric(t);
}

/* The value that a lower-case name has in its slot. */
static uint64_t
list_hash(struct text name)
{
	uint64_t hash = hash_text(14695981039346656037U, name);

	/* list_slot() uses the high bits, which FNV-1a mixes least. */
	hash = (hash ^ hash >> 32) * 0x9e3779b97f4a7c15U;
	return (hash & ~(uint64_t)LIST_EXCEPTION) | LIST_TAKEN;
}

/* The slot of hash, or the empty slot where it would go. */
static uint64_t *
list_slot(const struct list *list, uint64_t hash)
{
	size_t i = (size_t)((hash >> 32) * list->size >> 32);

	while (list->slots[i] != 0 &&
	    ((list->slots[i] ^ hash) & ~(uint64_t)LIST_EXCEPTION) != 0)
		i = i + 1 < list->size ? i + 1 : 0;
	return &list->slots[i];
}

/*
 * Adds a name or an exception; the first pass only counts it.  False if it is
 * not a domain.
 */
static bool
list_add(struct list *list, struct text name, bool exception)
{
	char lower[DOMAIN_MAX];
	uint64_t hash, *slot;

	if (name.len && name.at[name.len - 1] == '.')
		name.len--;
	if (!domain_is_valid(name))
		return false;
	if (++list->names > list->room)
		return true;
	hash = list_hash(text_lower(name, lower));
	slot = list_slot(list, hash);
	list->used += *slot == 0;
	*slot |= hash | (exception ? LIST_EXCEPTION : 0);
	return true;
}

/* The same for `name`, `.name` and `*.name`, which are equivalent. */
static bool
list_add_tree(struct list *list, struct text name)
{
	if (text_starts(name, "*."))
		name = text_from(name, 1);
	if (text_starts(name, "."))
		name = text_from(name, 1);
	return list_add(list, name, false);
}

/* Takes the first word off rest, and the blanks after it. */
static struct text
word_next(struct text *rest)
{
	struct text word = text_until(*rest, " \t");

	*rest = text_trim(text_from(*rest, word.len));
	return word;
}

/* Names that hosts files contain but do not mean to block. */
static const char list_locals[][LISTED_NAME] = { "0.0.0.0", "broadcasthost",
	"ip6-allhosts", "ip6-allnodes", "ip6-allrouters", "ip6-localhost",
	"ip6-localnet", "ip6-loopback", "ip6-mcastprefix", "local", "localhost",
	"localhost.localdomain", "" };

/* True if a list uses this address to block names. */
static bool
list_is_nowhere(struct text address)
{
	struct address a;

	return address_parse(address, 0, &a) &&
	    (address_is_any(&a) || address_is_loopback(&a));
}

/*
 * `ADDRESS name name ...`; if the address does not block (fe80::1%lo0), only
 * the local names are understood.
 */
static bool
list_hosts(struct list *list, struct text line)
{
	struct text address = word_next(&line);
	bool nowhere = list_is_nowhere(address);
	bool good = domain_is_numeric(address);

	while (line.len) {
		struct text name = word_next(&line);

		if (!name_is_among(name, list_locals) &&
		    (!nowhere || !list_add(list, name, false)))
			good = false;
	}
	return good;
}

/*
 * `/name/name/TO`, of which the caller saw the first slash.  TO must be empty
 * or, if is_address, an address that blocks; another DNS server for a name does
 * not block it.
 */
static bool
list_dnsmasq(struct list *list, struct text line, bool is_address)
{
	bool good = true;
	struct text to;
	size_t last;

	for (last = line.len; line.at[last - 1] != '/';)
		last--;
	to = text_from(line, last);
	if (last == 1 ||
	    (to.len &&
		!(is_address && (text_is(to, "#") || list_is_nowhere(to)))))
		return false;
	line = text_cut(line.at + 1, last - 1);
	while (line.len)
		if (!list_add_tree(list, text_split(&line, '/')))
			good = false;
	return good;
}

/*
 * The line without outer blanks and comment.  `##.name` and `###name` are not
 * comments but Adblock rules that hide parts of pages.
 */
static struct text
list_strip(struct text line)
{
	size_t i, marks = 0;

	line = text_trim(line);
	while (marks < line.len && line.at[marks] == '#')
		marks++;
	if ((marks == 2 || marks == 3) && marks < line.len &&
	    line.at[marks] != ' ' && line.at[marks] != '\t')
		return line;
	for (i = 0; i < line.len; i++)
		if (line.at[i] == '#' &&
		    (i == 0 || line.at[i - 1] == ' ' || line.at[i - 1] == '\t'))
			line.len = i;
	return text_trim(line);
}

/*
 * Adds the names in a line; false if part of it is not understood, such as an
 * Adblock rule with options, which change its meaning.
 */
static bool
list_line(struct list *list, struct text line)
{
	bool exception;

	line = list_strip(line);
	if (line.len == 0 || line.at[0] == '!' || line.at[0] == ';' ||
	    (line.at[0] == '[' && line.at[line.len - 1] == ']'))
		return true;
	exception = text_starts(line, "@@");
	if (exception)
		line = text_from(line, 2);
	if (text_starts(line, "||"))
		return line.at[line.len - 1] == '^' &&
		    list_add(list, text_cut(line.at + 2, line.len - 3),
			exception);
	if (exception)
		return false;
	if (text_starts(line, "address=/"))
		return list_dnsmasq(list, text_from(line, 8), true);
	if (text_starts(line, "server=/"))
		return list_dnsmasq(list, text_from(line, 7), false);
	if (text_starts(line, "local=/"))
		return list_dnsmasq(list, text_from(line, 6), false);
	if (text_until(line, " \t").len < line.len)
		return list_hosts(list, line);
	return list_add_tree(list, line);
}

/* Starts a pass over the file; false, with errno, on failure. */
static bool
list_rewind(struct list *list)
{
	reader_begin(&list_reader);
	list->names = list->read = list->skipped = 0;
	return lseek(list->fd, 0, SEEK_SET) != -1;
}

/*
 * Handles the end of the file: after the first pass, allocates slots, of which
 * the names will fill two thirds, and starts the second.  Returns as
 * list_step() does.
 */
static int
list_pass_end(struct list *list)
{
	size_t n = list->names;

	if (list->slots != NULL) {
		(void)snprintf(list_why, sizeof(list_why),
		    "it changed while it was read");
		return n == list->room ? 1 : -1;
	}
	list->room = n;
	list->size = n + n / 2 + 1;
	if (n <= LIST_DOMAINS)
		list->slots = calloc(list->size, sizeof(*list->slots));
	if (list->slots != NULL && list_rewind(list))
		return 0;
	(void)snprintf(list_why, sizeof(list_why), "no memory for %lu domains",
	    (unsigned long)n);
	return -1;
}

/*
 * Opens the file if need be, and reads some lines.  Returns 1 when the list is
 * complete, 0 if there is more to do, -1 on failure: list_why says why.  A FIFO
 * is refused, since reading it might block.
 */
static int
list_step(struct list *list)
{
	struct text line;
	unsigned n;
	int got = 1;

	if (list->fd == -1) {
		list->begun = clock_us();
		list->fd = open(list->path, O_RDONLY | O_NONBLOCK);
		got = list->fd != -1 && list_rewind(list) ? 1 : -1;
	}
	for (n = 0; n < LIST_STEP_LINES && got == 1; n++) {
		bool begins = !list_reader.cut; /* no rest of a long line */

		got = reader_next(&list_reader, list->fd, &line);
		if (got != 1)
			break;
		list->read += begins;
		if (text_find(line, '\0') < line.len) {
			(void)snprintf(list_why, sizeof(list_why),
			    "line %lu: a NUL byte: this is no text",
			    (unsigned long)list->read);
			return -1;
		}
		if (begins && (line.len > LIST_LINE || !list_line(list, line)))
			list->skipped++;
	}
	if (got == 0)
		return list_pass_end(list);
	if (got == -1)
		(void)snprintf(list_why, sizeof(list_why), "%s",
		    errno == ESPIPE ? "not a file" : strerror(errno));
	return got == 1 ? 0 : -1;
}

/* Ends the reading of a list: closes its file. */
static void
list_end(struct list *list)
{
	if (list->fd != -1)
		(void)close(list->fd);
	list->fd = -1;
	list->ms = (clock_us() - list->begun) / 1000;
}

/* Frees the slots of a list, which then covers nothing. */
static void
list_free(struct list *list)
{
	list_end(list);
	free(list->slots);
	list->slots = NULL;
	list->size = list->used = 0;
}

/* True if the list covers host, in any case, with or without final dots. */
static bool
list_has(const struct list *list, struct text host)
{
	char lower[DOMAIN_MAX];
	bool listed = false;

	host = host_trim(host);
	if (list->used == 0 || domain_is_numeric(host))
		return false;
	while (host.len > DOMAIN_MAX)
		(void)text_split(&host, '.');
	host = text_lower(host, lower);
	for (; host.len; (void)text_split(&host, '.')) {
		uint64_t slot = *list_slot(list, list_hash(host));

		if (slot & LIST_EXCEPTION)
			return false;
		if (slot != 0)
			listed = true;
	}
	return listed;
}

/* ---- 10. Rules: judging ---- */

/*
 * A rule is an action and its conditions; the first rule that matches decides.
 * A view comes in, and a verdict goes out.  A rule that needs a fact not known
 * yet is undecided and is judged again later.  The proxy connects to the very
 * address that was judged: it is not looked up again.
 *
 * Sections 9 to 12 are a chapter: all others call only the functions on its
 * door.  Of an exchange these say what its rules decide (rules_judge), how they
 * bend it (rules_bend), and what they change in a head (rules_rewrite).
 *
 * Door of sections 9 to 12: rules_bend, rules_give, rules_judge, rules_read,
 * rules_rewrite, rules_rewriter, rules_seek, rules_step, rules_take,
 * rules_trust, rules_try, rules_warn.
 *
 * Door: built_in, condition_judge, exchange_view, name_is_free, rule_judge,
 * rules_bend, rules_judge, rules_let_in, rules_next, rules_now, rules_rewrite,
 * rules_rewriter, rules_seek, rules_trust, subjects.
 */

enum {
	/* What `chance` is a share of. */
	CHANCES = 100,
	/* Texts to find in bodies; each has a byte: see access_response(). */
	NEEDLES_MAX = 16,
	/* Lists of domains in all rules. */
	LISTS_MAX = 32
};

/* The effect of a rule. */
enum action {
	ACTION_ALLOW,
	ACTION_DENY,
	ACTION_LOGIN,   /* allow a logged-in user, else ask for a login */
	ACTION_DROP,    /* close without a response */
	ACTION_VIA,     /* connect through a parent */
	ACTION_DIRECT,  /* connect without a parent */
	ACTION_FROM,    /* connect from this local address */
	ACTION_NOCACHE, /* neither answer from the cache nor store */
	ACTION_CACHE,   /* set the freshness lifetime */
	ACTION_OFFLINE, /* only the cache answers, however old the entry */
	ACTION_TO,      /* connect there instead */
	ACTION_ANSWER,  /* a response of its own */
	ACTION_HANG,    /* no response at all */
	ACTION_DELAY,   /* the response comes later */
	ACTION_RATE,    /* no faster than that */
	ACTION_LIMIT,   /* so many at once for one client */
	ACTION_CUT,     /* the response ends too early */
	ACTION_TRACE,   /* the trace shows it */
	ACTION_TRUST,   /* believe the PROXY header of this peer */
	ACTION_SET,     /* replace all fields of this name by one */
	ACTION_ADD,     /* add a field */
	ACTION_UNSET,   /* remove all fields of these names */
	ACTIONS
};

/* In a group the first match decides; in the last two every match applies. */
enum rule_group {
	GROUP_ACCESS,
	GROUP_PAGE, /* access to the proxy's own pages */
	GROUP_ROUTE,
	GROUP_SOURCE,
	GROUP_CACHE,
	GROUP_TRACE, /* this to GROUP_CUT bend an exchange, see bend_groups */
	GROUP_LIMIT,
	GROUP_ANSWER, /* answer and hang */
	GROUP_DELAY,
	GROUP_RATE,
	GROUP_CUT,
	GROUP_TRUST,    /* judged by the peer, before there is a request */
	GROUP_REQUEST,  /* rewriting of requests */
	GROUP_RESPONSE, /* rewriting of responses */
	GROUPS
};

/* The subject of a condition; see the table `subjects`. */
enum subject {
	SUBJECT_CLIENT,
	SUBJECT_USER,
	SUBJECT_METHOD,
	SUBJECT_HOST,
	SUBJECT_LIST,
	SUBJECT_PORT,
	SUBJECT_URL,
	SUBJECT_FIELD,
	SUBJECT_TIME,
	SUBJECT_ADDRESS,
	SUBJECT_STATUS,
	SUBJECT_TYPE,
	SUBJECT_SIZE,
	SUBJECT_BODY,
	SUBJECT_PAGE,
	SUBJECT_CHANCE,
	SUBJECTS
};

/* Facts that may be unknown when a rule is judged: bits. */
enum fact {
	FACT_ADDRESS = 1,  /* the server's address */
	FACT_RESPONSE = 2, /* the response head */
	FACT_LENGTH = 4,   /* the length of its body */
	FACT_BODY = 8,     /* all of its body */
	FACTS = 15         /* all of them */
};

/* The truth value of a condition, a rule or a verdict. */
enum truth {
	TRUTH_NO,
	TRUTH_YES,
	TRUTH_UNDECIDED /* depends on a fact not known yet */
};

/* One value of a condition. */
struct value {
	struct value *next; /* of the same condition */
	struct text text;   /* as written, with quotes undone */
	bool any;           /* the subject's special word: local or * */
	union {
		struct network network;
		struct numbers numbers;
		struct span span;
		regex_t regex;
		const struct list *list;
		unsigned needle; /* which of the rules' needles */
		struct {
			unsigned share, number; /* of CHANCES; which of them */
		} chance;
	} as; /* by the subject */
};

/* A part of a rule: matches if a value does, or, inverted, if none does. */
struct condition {
	struct condition *next; /* of the same rule */
	enum subject subject;   /* that it tests */
	const char *word;       /* name of the subject */
	unsigned needs;         /* facts needed to judge it */
	bool inverted;          /* `not` precedes it */
	struct text name;       /* of the field */
	struct value *values;   /* at least one */
};

/* A rule. */
struct rule {
	struct rule *next;  /* of the same group */
	enum action action; /* its effect if it matches */
	const char *where;  /* `file:line`, or the name of an option */
	bool built_in;      /* not written by the user */
	const char *text;   /* as written, with passwords masked */
	unsigned needs;     /* facts that its conditions need */
	struct condition *conditions; /* all must match */
	enum refusal refusal;         /* of ACTION_DENY */
	int status;                   /* of ACTION_DENY, ACTION_ANSWER */
	struct value *names;          /* of fields; several: ACTION_UNSET */
	struct field field;           /* of ACTION_SET, ACTION_ADD */
	struct text words;            /* the reason, or the text of an answer */
	struct parent *parents;  /* of ACTION_VIA, in their order, ACTION_TO */
	struct address from[2];  /* of ACTION_FROM: IPv4, IPv6 */
	const char *type, *file; /* of ACTION_ANSWER; file: NULL without */
	struct numbers amount;   /* of those that have one: ms, bytes, or n */
};

/* A user and the password. */
struct account {
	struct account *next;
	struct text user, password;
	char line[]; /* that has both */
};

/* Memory of a set of rules: all pieces are freed together. */
struct piece {
	struct piece *next;
	regex_t *regex;  /* in data, to be freed first, or NULL */
	uint64_t data[]; /* aligned for everything stored here */
};

/* A set of rules, parsed. */
struct rules {
	unsigned refs;              /* exchanges that use them, and rules_now */
	unsigned errors;            /* number of errors found in them */
	struct piece *pieces;       /* their memory */
	struct rule *first[GROUPS]; /* by group */
	struct account *accounts;   /* who may log in */
	bool logins;                /* a `users` line was read */
	unsigned rewrites[2];       /* rules for requests, for responses */
	unsigned chances;           /* conditions of SUBJECT_CHANCE */
	unsigned needles_n;         /* number of needles */
	struct text needles[NEEDLES_MAX]; /* texts of SUBJECT_BODY */
	unsigned lists_n;                 /* number of lists */
	unsigned lists_read;              /* number of lists read so far */
	struct list lists[LISTS_MAX];
};

/* What rules are judged by; see exchange_view(). */
struct view {
	const struct exchange *x; /* its client and its request are judged */
	unsigned known;           /* facts */
	unsigned never;           /* facts that will never be known */
	struct text host;         /* of the URL, without trailing dots */
	struct address address;   /* of the server; family 0: not known */
	const struct response *response; /* to the request, if known */
	uint64_t length; /* of its body, or of what has passed of that */
	const char *url; /* built at the first use */
	bool timed;      /* `when` is set */
	struct tm when;  /* local time, set at the first use */
};

/* The result of judging a group. */
struct verdict {
	const struct rule *rule;      /* that decides, or NULL */
	const struct rule *undecided; /* then the first that still may, or */
				      /* NULL: no rule matches */
	bool refuses;                 /* `rule` is a denial */
};

/*
 * The groups that bend an exchange; an answer comes last: it ends the judging.
 */
static const enum rule_group bend_groups[] = { GROUP_TRACE, GROUP_LIMIT,
	GROUP_DELAY, GROUP_RATE, GROUP_CUT, GROUP_CACHE, GROUP_ANSWER, GROUPS };

static struct rules *rules_now; /* in force */

static struct rules *rules_next; /* being read to replace them, or NULL */

static const char built_in[] = "built-in";

/* ---- facts to judge by ---- */

/* Adds the response, and what is known of its body. */
static void
view_response(struct view *v, const struct response *r)
{
	const struct exchange *x = v->x;
	const struct request *q = x->request;
	uint64_t length = answer_is_stored(q) ? q->body : response_length(r);
	bool bodiless = response_is_bodiless(r->status, q->method);
	bool whole = bodiless || (q->access.answer != NULL && x->down.whole);

	v->response = r;
	v->length = length != UINT64_MAX ? length :
	    bodiless                     ? 0 :
					   x->down.payload + x->down.ready;
	v->known |= FACT_RESPONSE;
	if (length != UINT64_MAX || whole)
		v->known |= FACT_LENGTH;
	if (length == 0 || whole)
		v->known |= FACT_BODY;
}

/*
 * Sets v to what is known of x so far; x must outlive v.  r is the response or
 * NULL.  server: the address that would answer, where x does not have it; of
 * family 0 if it will never be known; or NULL.  A rule `to' names another
 * server, and a parent looks up names itself: the server's address is then
 * known only if the URL has a numeric host.  An entry has the address that it
 * came from.
 */
static void
exchange_view(const struct exchange *x, const struct response *r,
    const struct address *server, struct view *v)
{
	const struct request *q = x->request;
	const struct parent *parent = q->route.parent;
	bool to = parent != NULL && parent->kind == PARENT_TO;
	bool through = parent_is_proxy(parent);

	memset(v, 0, sizeof(*v));
	v->x = x;
	v->host = host_trim(q->target.host);
	if (q->method == METHOD_CONNECT)
		v->never = FACT_RESPONSE | FACT_LENGTH | FACT_BODY;
	(void)address_of_host(to ? text_of(parent->host) : v->host, 0,
	    &v->address);
	if (server == NULL && answer_is_stored(q))
		server = &q->route.list[0];
	else if (server == NULL && !through &&
	    (x->record.server.family == AF_INET ||
		x->record.server.family == AF_INET6))
		server = &x->record.server;
	if (server != NULL && server->family != 0)
		v->address = *server;
	if (v->address.family != 0)
		v->known = FACT_ADDRESS;
	else if (server != NULL || through)
		v->never |= FACT_ADDRESS;
	if (r != NULL)
		view_response(v, r);
}

/* ---- judging ---- */

/* True if pattern matches: `.x` matches all names below x, `x` only x. */
static bool
host_matches(struct text pattern, struct text name)
{
	if (pattern.len > 0 && *pattern.at == '.') {
		if (name.len <= pattern.len)
			return false;
		name = text_from(name, name.len - pattern.len);
	}
	return text_same(pattern, name);
}

/*
 * The URL of the request, its host in lower case; host:port for CONNECT.
 * Built once for each view, and valid until another view builds its own.
 */
static const char *
view_url(struct view *v)
{
	static char url[LINE_MAX_BYTES + HOST_MAX + 32];
	const struct request *q = v->x->request;
	bool connect = q->method == METHOD_CONNECT;
	struct text path = q->target.path;
	char place[HOST_MAX + 10];

	if (v->url != NULL)
		return v->url;
	authority_print(v->host, q->target.port, connect, place);
	(void)text_lower(text_of(place), place);
	(void)snprintf(url, sizeof(url), "%s%s%s%.*s", connect ? "" : "http://",
	    place, connect || (path.len > 0 && *path.at == '/') ? "" : "/",
	    (int)path.len, path.at);
	v->url = url;
	return url;
}

/* True if t is pattern; a star at its end stands for any text. */
static bool
star_matches(struct text pattern, struct text t)
{
	if (pattern.at[pattern.len - 1] == '*') {
		pattern.len--;
		t.len = t.len < pattern.len ? t.len : pattern.len;
	}
	return text_same(pattern, t);
}

/*
 * True if a field that the condition names has a matching value.  If a server
 * sends several types, in several fields or in one, some clients use the first,
 * some the last: all are tested, without their parameters.
 */
static bool
field_matches(const struct condition *c, const struct value *value,
    const struct view *v)
{
	const struct head *h = c->needs & FACT_RESPONSE ? &v->response->head :
							  &v->x->request->head;
	static char string[BUFFER_SIZE];
	bool hit = false;
	size_t i;

	for (i = 0; i < h->n && !hit; i++) {
		struct text t = field_value(h, i), type;

		if (!text_same(field_name(h, i), c->name))
			continue;
		(void)text_copy(t, string, sizeof(string));
		hit = c->subject != SUBJECT_TYPE &&
		    regexec(&value->as.regex, string, 0, NULL, 0) == 0;
		while (
		    c->subject == SUBJECT_TYPE && !hit && list_next(&t, &type))
			hit = star_matches(value->text,
			    text_trim(text_split(&type, ';')));
	}
	return hit;
}

/*
 * True if a value of the condition matches the facts in v.  A body may be seen
 * to be too long, or to contain a text, before all of it has passed.
 */
static bool
value_matches(const struct condition *c, const struct value *value,
    struct view *v)
{
	const struct exchange *x = v->x;
	const struct request *q = x->request;
	const struct account *user = x->record.user;

	switch (c->subject) {
	case SUBJECT_CLIENT:
		return value->any ? x->local :
				    network_has(&value->as.network, &x->peer);
	case SUBJECT_USER:
		return user != NULL &&
		    (value->any || text_equals(value->text, user->user));
	case SUBJECT_METHOD:
		return text_equals(value->text, q->name);
	case SUBJECT_HOST:
		return host_matches(value->text, v->host);
	case SUBJECT_LIST:
		return list_has(value->as.list, v->host);
	case SUBJECT_PORT:
		return numbers_have(&value->as.numbers, q->target.port);
	case SUBJECT_URL:
		return regexec(&value->as.regex, view_url(v), 0, NULL, 0) == 0;
	case SUBJECT_FIELD:
	case SUBJECT_TYPE:
		return field_matches(c, value, v);
	case SUBJECT_TIME:
		v->timed = v->timed || localtime_r(&now.wall, &v->when) != NULL;
		return v->timed && span_has(&value->as.span, &v->when);
	case SUBJECT_ADDRESS:
		return network_has(&value->as.network, &v->address);
	case SUBJECT_PAGE:
		return text_same(value->text, text_from(q->uri, 1));
	case SUBJECT_CHANCE:
		/* Always in a trial, which shows what may be. */
		return q->dice == 0 ||
		    random_mix(q->dice + value->as.chance.number) % CHANCES <
		    value->as.chance.share;
	case SUBJECT_STATUS:
		return numbers_have(&value->as.numbers,
		    (uint64_t)v->response->status);
	case SUBJECT_SIZE:
		if (v->known & FACT_LENGTH)
			return numbers_have(&value->as.numbers, v->length);
		return value->as.numbers.last == UINT64_MAX &&
		    v->length >= value->as.numbers.first &&
		    !(v->never & FACT_LENGTH);
	case SUBJECT_BODY:
		return q->access.found >> value->as.needle & 1;
	case SUBJECTS:
		break;
	}
	return false;
}

/*
 * The subjects.  needs: facts; single: a message has only one, so that two
 * conditions on it can't both match; any: a word that is special unless it is
 * quoted; max: the largest number allowed; wants: a description of the values,
 * for errors.  A new condition is a row here, cases in value_parse() and
 * value_matches(), and its text under Conditions and Grammar in the manual.
 */
static const struct {
	char word[8];
	unsigned needs;
	bool single;
	char any[6];
	unsigned max;
	const char *wants;
} subjects[SUBJECTS] = {
	[SUBJECT_CLIENT] = { "client", 0, true, "local", 0,
	    "an address or a network such as 10.0.0.0/8, or local" },
	[SUBJECT_USER] = { "user", 0, true, "*", 0,
	    "names with blanks between them, or * for any user" },
	[SUBJECT_METHOD] = { "method", 0, true, "", 0,
	    "a method in capitals such as GET" },
	[SUBJECT_HOST] = { "host", 0, true, "", 0,
	    "a host without its port such as example.com, or .example.com "
	    "for all below it" },
	[SUBJECT_LIST] = { "list", 0, false, "", 0, "a file" },
	[SUBJECT_PORT] = { "port", 0, true, "", 65535,
	    "a port or a range such as 8000-8999" },
	[SUBJECT_URL] = { "url", 0, false, "", 0, "a regular expression" },
	[SUBJECT_FIELD] = { "field", 0, false, "", 0,
	    "a name and a regular expression" },
	[SUBJECT_TIME] = { "time", 0, false, "", 0,
	    "days such as Mon-Fri, hours such as 08:00-17:30, or both" },
	[SUBJECT_ADDRESS] = { "address", FACT_ADDRESS, true, "", 0,
	    "an address or a network such as 10.0.0.0/8" },
	[SUBJECT_STATUS] = { "status", FACT_RESPONSE, true, "", 999,
	    "a status or a range such as 500-599" },
	[SUBJECT_TYPE] = { "type", FACT_RESPONSE, true, "", 0,
	    "a type such as text/html or video/*" },
	[SUBJECT_SIZE] = { "size", FACT_RESPONSE | FACT_LENGTH, false, "", 0,
	    "a size behind < or > such as >10M" },
	[SUBJECT_BODY] = { "body", FACT_BODY, false, "", 0, "a text" },
	[SUBJECT_PAGE] = { "page", 0, true, "", 0, "status or metrics" },
	[SUBJECT_CHANCE] = { "chance", 0, false, "", 0, "a share such as 10%" },
};

/*
 * Judges a condition.  If a fact that it needs can never be known, it does not
 * match, inverted or not.  A part of a body can show that a value matches, but
 * not that none does.
 */
static enum truth
condition_judge(const struct condition *c, struct view *v)
{
	unsigned missing = c->needs & ~v->known;
	const struct value *value = c->values;
	bool hit = false;

	if ((missing & (FACT_ADDRESS | FACT_RESPONSE)) == 0)
		for (; value != NULL && !hit; value = value->next)
			hit = value_matches(c, value, v);
	if (missing != 0 && !hit)
		return missing & v->never ? TRUTH_NO : TRUTH_UNDECIDED;
	return hit != c->inverted ? TRUTH_YES : TRUTH_NO;
}

/* Judges a rule: all its conditions must match. */
static enum truth
rule_judge(const struct rule *rule, struct view *v)
{
	const struct condition *c;
	enum truth truth, all = TRUTH_YES;

	/* A 200 would promise a tunnel. */
	if (rule->action == ACTION_ANSWER && rule->status < 300 &&
	    v->x->request->method == METHOD_CONNECT && !v->x->hidden)
		return TRUTH_NO;
	for (c = rule->conditions; c != NULL; c = c->next) {
		truth = condition_judge(c, v);
		if (truth == TRUTH_NO)
			return TRUTH_NO;
		if (truth == TRUTH_UNDECIDED)
			all = TRUTH_UNDECIDED;
	}
	return all;
}

/*
 * True if the rule is one of access and would deny a request of a user, or
 * without one.
 */
static bool
rule_refuses(const struct rule *rule, const struct account *user)
{
	return rule->action == ACTION_DENY || rule->action == ACTION_DROP ||
	    (rule->action == ACTION_LOGIN && user == NULL);
}

/*
 * Judges a group: the first rule that matches decides.  If a rule before it is
 * undecided, so is the verdict, unless every rule that could still decide is a
 * denial: then no more facts are needed.  `offline` waits for none of them.
 */
static struct verdict
group_judge(const struct rules *rules, enum rule_group group, struct view *v)
{
	const struct rule *rule, *undecided = NULL;
	bool refuses = true;

	for (rule = rules->first[group]; rule != NULL; rule = rule->next) {
		enum truth truth = rule_judge(rule, v);

		if (truth == TRUTH_NO)
			continue;
		refuses = refuses && rule_refuses(rule, v->x->record.user);
		if (truth == TRUTH_YES &&
		    (refuses || undecided == NULL ||
			rule->action == ACTION_OFFLINE))
			return (struct verdict){ rule, NULL, refuses };
		if (undecided == NULL)
			undecided = rule;
		if (truth == TRUTH_YES || (!refuses && group != GROUP_CACHE))
			break;
	}
	return (struct verdict){ NULL, undecided, false };
}

/*
 * The verdict of a group on x's request and, unless it is NULL, on the response
 * r to it; server: see exchange_view().  A rule about the cache is judged when
 * a head arrives, and for an entry by the facts known then: a length that the
 * head did not give stays unknown, or a stored entry might never be used.
 */
static struct verdict
rules_judge(const struct exchange *x, enum rule_group group,
    const struct response *r, const struct address *server)
{
	struct view v;

	if (x->rules->first[group] == NULL)
		return (struct verdict){ NULL, NULL, false };
	exchange_view(x, r, server, &v);
	if (group == GROUP_CACHE && r != NULL)
		v.never |= FACT_LENGTH;
	return group_judge(x->rules, group, &v);
}

/*
 * The next rule that bends x, or NULL; *at is the caller's, 0 at first.  Each
 * group is judged for itself; of the rules about the cache only `offline` bends
 * a request.
 */
static const struct rule *
rules_bend(const struct exchange *x, size_t *at)
{
	while (bend_groups[*at] != GROUPS) {
		const struct rule *rule =
		    rules_judge(x, bend_groups[(*at)++], NULL, NULL).rule;

		if (rule != NULL && rule->action != ACTION_CACHE &&
		    rule->action != ACTION_NOCACHE)
			return rule;
	}
	return NULL;
}

/*
 * Looks for the texts of `body` conditions in the next bytes of x's response.
 * True if one more was found.
 */
static bool
rules_seek(struct exchange *x, struct text piece)
{
	struct access *access = &x->request->access;
	unsigned char *states = (unsigned char *)access->answer->data;
	unsigned i, before = access->found;

	for (i = 0; i < x->rules->needles_n; i++)
		if (needle_scan(x->rules->needles[i], states + i, piece))
			access->found |= 1U << i;
	return access->found != before;
}

/* True if a rule on the body may match the response to v's request. */
static bool
rules_seek_body(const struct rules *rules, struct view *v)
{
	const struct rule *rule = rules->first[GROUP_ACCESS];

	for (; rule != NULL; rule = rule->next)
		if ((rule->needs & FACT_BODY) &&
		    rule_judge(rule, v) != TRUTH_NO)
			return true;
	return false;
}

/*
 * True if rules may change fields of that name, which may end in a star:
 * those that do not frame or route the message.
 */
static bool
name_is_free(struct text name)
{
	static const char fixed[][LISTED_NAME] = { "Max-Forwards",
		"Content-Range", "Expect", "Trailer", "" };

	return text_is_token(name) && !text_is(name, "*") &&
	    !name_is_among(name, fields_of_hop) && !name_is_among(name, fixed);
}

/*
 * True if one of the names is that of a field; never of those that no rule may
 * change, even if a star matches them.
 */
static bool
name_is_taken(const struct value *names, struct text name)
{
	while (names != NULL && !star_matches(names->text, name))
		names = names->next;
	return names != NULL && name_is_free(name);
}

/* Removes the fields of these names, from the head and earlier rules. */
static void
rewrites_take(struct rewrites *w, const struct value *names,
    const struct head *h)
{
	static const char own[][13] = { "Via", "Date", "Age", "Cache-Status" };
	size_t i, n = 0;

	w->strips = true;
	for (i = 0; i < sizeof(own) / sizeof(own[0]); i++)
		if (name_is_taken(names, text_of(own[i])))
			w->own |= 1U << i;
	for (i = 0; i < h->n; i++)
		if (name_is_taken(names, field_name(h, i)))
			mark_set(&w->taken, i);
	for (i = 0; i < w->n; i++)
		if (!name_is_taken(names, w->fields[i]->name))
			w->fields[n++] = w->fields[i];
	w->n = n;
}

/*
 * Sets w to the changes that the rules make to x's request, or to the response
 * r unless it is NULL: those of all rules that match, in order.  If rules look
 * for a text in the response, or it is recorded, removes Accept-Encoding: the
 * body must not be compressed.  Without such rules w stays as it is: empty.
 */
static void
rules_rewrite(const struct exchange *x, const struct response *r,
    struct rewrites *w)
{
	static const struct value encoding = { .text = { "Accept-Encoding",
						   15 } };
	enum rule_group group = r ? GROUP_RESPONSE : GROUP_REQUEST;
	const struct head *h = r ? &r->head : &x->request->head;
	const struct rules *rules = x->rules;
	const struct rule *rule = rules->first[group];
	bool seeks = r == NULL && (options.record || rules->needles_n > 0);
	struct view v;

	if (rule == NULL && !seeks)
		return;
	memset(w, 0, sizeof(*w));
	exchange_view(x, r, NULL, &v);
	for (; rule != NULL; rule = rule->next) {
		enum truth truth = rule_judge(rule, &v);

		w->undecided = w->undecided || truth == TRUTH_UNDECIDED;
		if (truth != TRUTH_YES)
			continue;
		if (rule->action != ACTION_ADD)
			rewrites_take(w, rule->names, h);
		if (rule->action != ACTION_UNSET)
			w->fields[w->n++] = &rule->field;
	}
	if (seeks && (options.record || rules_seek_body(rules, &v)))
		rewrites_take(w, &encoding, h);
}

/*
 * The last rule that has changed the fields of that name, of x's request or of
 * the response r; or NULL.
 */
static const struct rule *
rules_rewriter(const struct exchange *x, const struct response *r,
    struct text name)
{
	enum rule_group group = r ? GROUP_RESPONSE : GROUP_REQUEST;
	const struct rule *rule = x->rules ? x->rules->first[group] : NULL;
	const struct rule *last = NULL;
	struct view v;

	if (rule != NULL)
		exchange_view(x, r, NULL, &v);
	for (; rule != NULL; rule = rule->next)
		if (name_is_taken(rule->names, name) &&
		    rule_judge(rule, &v) == TRUTH_YES)
			last = rule;
	return last;
}

/* True if a rule trusts the PROXY header of x's peer. */
static bool
rules_trust(const struct exchange *x)
{
	struct view v = { .x = x };

	return group_judge(rules_now, GROUP_TRUST, &v).rule != NULL;
}

/*
 * True if only clients on this machine can match the rule, which has at most
 * one condition on them that is not inverted.
 */
static bool
rule_is_local(const struct rule *rule)
{
	const struct condition *c = rule->conditions;
	const struct value *value;

	while (c != NULL && (c->subject != SUBJECT_CLIENT || c->inverted))
		c = c->next;
	for (value = c ? c->values : NULL; value != NULL; value = value->next)
		if (!value->any &&
		    !address_is_local(&value->as.network.address))
			return false;
	return c != NULL;
}

/* True if a rule of the user may let in clients on other machines. */
static bool
rules_let_in(void)
{
	static const struct account user;
	const struct rule *rule = rules_now->first[GROUP_ACCESS];

	for (; rule != NULL; rule = rule->next)
		if (!rule->built_in && !rule_refuses(rule, &user) &&
		    !rule_is_local(rule))
			return true;
	return false;
}

/* ---- 11. Rules: conditions as text ---- */

/*
 * Users, and rules as text: words, conditions and their values.  The parser
 * names what is wrong, with file and line, and goes on.
 *
 * Door: account_login, condition_parse, parser_begin, parser_copy,
 * parser_error, parser_invalid, parser_logins, parser_new, parser_split,
 * parser_take, parser_takes, rules_give.
 */

enum {
	/* Time that the reading of lists takes in one turn. */
	LIST_STEP_US = 1000,
	/* Words in a rule. */
	WORDS_MAX = RULE_LINE_MAX / 2 + 1,
	/* Bytes of `file:line`, for the log. */
	RULE_NAME_MAX = 256,
	/* Bytes of the reason in a deny rule, for the page; see actions[]. */
	REASON_MAX = 200
};

/* The longest duration in a rule: ten years, as good as forever. */
#define DURATION_MAX_MS (UINT64_C(10) * 365 * DAY_S * 1000)

/* ---- users (RFC 7617) ---- */

/*
 * The user who logs in by Proxy-Authorization with the Basic scheme.  NULL if
 * the login is missing or wrong.
 */
static const struct account *
account_login(const struct rules *rules, const struct head *h)
{
	char plain[2 * CREDENTIAL_MAX + 2];
	struct text t = head_value(h, "Proxy-Authorization"), user;
	const struct account *a, *found = NULL;
	size_t n;

	if (!text_starts(t, "Basic "))
		return NULL;
	t = text_trim(text_from(t, strlen("Basic ")));
	if (!base64_decode(t, plain, sizeof(plain), &n))
		return NULL;
	t = text_cut(plain, n);
	if (text_find(t, ':') == t.len)
		return NULL;
	user = text_split(&t, ':');
	for (a = rules->accounts; a != NULL; a = a->next)
		if (text_equals(a->user, user) && secret_same(t, a->password))
			found = a;
	return found;
}

/* ---- reading rules ---- */

/* A word of a rule; a NUL follows it. */
struct word {
	struct text t;
	bool quoted; /* it is not a keyword */
};

/* The rule being read. */
struct parser {
	struct rules *rules;       /* it is added to these */
	const char *file;          /* that contains it, or an option */
	char where[RULE_NAME_MAX]; /* `file:line` */
	bool bad;                  /* an error in it was reported */
	enum rule_group group;     /* of the rule */
	size_t n, at;              /* number of words, index of the next */
	struct word words[WORDS_MAX];
	struct rule **end[GROUPS]; /* where the next rule goes */
	struct rule **guard;       /* where the guards go, or NULL */
};

/* Prepares p for a line of a file, or (0) for the only one. */
static void
parser_begin(struct parser *p, const char *file, unsigned line)
{
	p->file = file;
	p->bad = false;
	(void)snprintf(p->where, sizeof(p->where),
	    line ? "%.200s:%u" : "%.200s", file, line);
}

/* Reports an error and where it is; only the first error of each rule. */
static void
parser_error(struct parser *p, const char *format, ...)
{
	char words[512];
	va_list args;

	if (p->bad)
		return;
	p->bad = true;
	p->rules->errors++;
	va_start(args, format);
	(void)vsnprintf(words, sizeof(words), format, args);
	va_end(args);
	secret_hide_string(words);
	warn("%s: %s", p->where, words);
}

/* Reports an invalid value of `keyword`, and what to write instead. */
static void
parser_invalid(struct parser *p, const char *keyword, const struct word *word,
    const char *wants)
{
	parser_error(p, "%s: not valid: %.100s; write %s", keyword, word->t.at,
	    wants);
}

/*
 * Allocates n zeroed bytes, freed with the rules.  Without memory, reports an
 * error and returns NULL.
 */
static void *
parser_new(struct parser *p, size_t n)
{
	struct piece *piece = calloc(1, sizeof(*piece) + n);

	if (piece == NULL) {
		parser_error(p, "no memory");
		return NULL;
	}
	piece->next = p->rules->pieces;
	p->rules->pieces = piece;
	return piece->data;
}

/* Copies t to a string that is freed with the rules; NULL without memory. */
static char *
parser_copy(struct parser *p, struct text t)
{
	char *to = parser_new(p, t.len + 1);

	if (to != NULL)
		(void)text_copy(t, to, t.len + 1);
	return to;
}

/* Ends one use of the rules; after the last they are freed. */
static void
rules_give(struct rules **at)
{
	struct rules *rules = *at;
	struct piece *piece;

	*at = NULL;
	if (rules == NULL || --rules->refs > 0)
		return;
	while (rules->lists_n > 0)
		list_free(&rules->lists[--rules->lists_n]);
	while ((piece = rules->pieces) != NULL) {
		rules->pieces = piece->next;
		if (piece->regex != NULL)
			regfree(piece->regex);
		free(piece);
	}
	free(rules);
}

/*
 * The subject that the next word names, or SUBJECTS.  In a rule about pages,
 * `status` is one of them.
 */
static enum subject
subject_next(const struct parser *p)
{
	const struct word *word = &p->words[p->at];
	unsigned i = p->at == p->n || word->quoted ? SUBJECTS : 0;

	while (i < SUBJECTS &&
	    (!text_is(word->t, subjects[i].word) ||
		(i == SUBJECT_STATUS && p->group == GROUP_PAGE)))
		i++;
	return (enum subject)i;
}

/* Takes the next word if it is a value, not a subject or `not`; else NULL. */
static const struct word *
parser_take(struct parser *p)
{
	const struct word *word = &p->words[p->at];

	if (p->at == p->n || subject_next(p) != SUBJECTS ||
	    (!word->quoted && text_is(word->t, "not")))
		return NULL;
	p->at++;
	return word;
}

/* Takes the next word if it is `string`, unquoted; false if it is not. */
static bool
parser_takes(struct parser *p, const char *string)
{
	bool is = p->at < p->n && !p->words[p->at].quoted &&
	    text_is(p->words[p->at].t, string);

	p->at += is;
	return is;
}

/* Reports that a value of a condition is missing. */
static void
parser_missing(struct parser *p, const char *keyword)
{
	if (p->at == p->n)
		parser_error(p, "%s: a value is missing", keyword);
	else
		parser_error(p,
		    "%s: a value is missing: %s begins a condition; write "
		    "it in quotes to make it a value",
		    keyword, p->words[p->at].t.at);
}

/*
 * Removes in place the quotes of the word at *t, and moves *t behind it.
 * False if the closing quote is missing or not at the end of the word.
 */
static bool
word_unquote(char **t, struct word *word)
{
	char *from = *t + 1, *to = *t;

	word->t.at = to;
	word->quoted = true;
	for (; *from != '"'; *to++ = *from++) {
		if (from[0] == '\\' && (from[1] == '"' || from[1] == '\\'))
			from++;
		if (*from == '\0')
			return false;
	}
	*to = '\0';
	word->t.len = (size_t)(to - word->t.at);
	*t = from + 1;
	return **t == '\0' || is_among(**t, " \t");
}

/* Splits a line, in place, into words; false after an error. */
static bool
parser_split(struct parser *p, char *line)
{
	for (p->n = p->at = 0;; p->n++) {
		struct word *word = &p->words[p->n];

		line += strspn(line, " \t");
		if (*line == '\0' || *line == '#')
			return true;
		assert(p->n < WORDS_MAX);
		word->quoted = false;
		word->t = text_cut(line, strcspn(line, " \t"));
		if (*line != '"') {
			line += word->t.len;
			if (*line != '\0')
				*line++ = '\0';
		} else if (!word_unquote(&line, word)) {
			parser_error(p,
			    "a quote that is not closed, or that text follows "
			    "without a blank");
			return false;
		}
	}
}

/* ---- the values of conditions ---- */

/* Refuses a rule that needs a user if there are no users. */
static void
parser_logins(struct parser *p)
{
	if (!p->rules->logins)
		parser_error(p, "nobody can log in: no rule `users' before it");
}

/* Parses a host, or `.host` for all below it; drops dots at the end. */
static bool
host_parse(struct text *t)
{
	if (text_starts(*t, "*."))
		*t = text_from(*t, 1);
	*t = host_trim(*t);
	if (t->len > 2 && t->at[0] == '[' && t->at[t->len - 1] == ']')
		*t = text_cut(t->at + 1, t->len - 2);
	return host_is_valid(*t, text_find(*t, ':') < t->len);
}

/* Compiles `string` into value, the newest piece; false after an error. */
static bool
regex_parse(struct parser *p, const char *string, struct value *value)
{
	char words[200];
	int error;

	if (is_among(*string, "*+?")) {
		parser_error(p,
		    "%.200s: an expression can't begin with %c; any text is .*",
		    string, *string);
		return false;
	}
	error = regcomp(&value->as.regex, string, REG_EXTENDED | REG_NOSUB);
	if (error != 0) {
		(void)regerror(error, &value->as.regex, words, sizeof(words));
		parser_error(p, "%.200s: %s", string, words);
		return false;
	}
	assert(value == (void *)p->rules->pieces->data);
	p->rules->pieces->regex = &value->as.regex;
	return true;
}

/* Parses [request|response] NAME REGEX, of which the first word was taken. */
static bool
value_field(struct parser *p, struct condition *c, struct value *value)
{
	const struct word *word;

	p->at--;
	c->needs = parser_takes(p, "response") ? FACT_RESPONSE : 0;
	if (c->needs == 0)
		(void)parser_takes(p, "request");
	word = parser_take(p);
	if (word != NULL) {
		c->name = word->t;
		word = parser_take(p);
	}
	if (word == NULL)
		parser_missing(p, "field");
	else if (!text_is_token(c->name) || parser_take(p) != NULL ||
	    text_find(c->name, '*') < c->name.len)
		parser_error(p, "field: it wants one name and one expression");
	return !p->bad && regex_parse(p, word->t.at, value);
}

/*
 * Parses days, hours, or days and hours.  Further hours have the same days, so
 * days after hours without days are an error: they would be misread.
 */
static bool
time_parse(struct parser *p, const struct condition *c, struct value *value)
{
	struct span *span = &value->as.span;
	const struct word *word;

	span->days = c->values != NULL ? c->values->as.span.days : DAYS_ALL;
	span->from = 0;
	span->to = 1440;
	if (hours_parse(value->text, &span->from, &span->to))
		return true;
	if (!days_parse(value->text, &span->days))
		return false;
	if (c->values != NULL && c->values->as.span.days == DAYS_ALL)
		parser_error(p,
		    "time: days stand before their hours, as in "
		    "Mon-Fri 08:00-17:30");
	word = parser_take(p);
	if (word != NULL && !hours_parse(word->t, &span->from, &span->to))
		p->at--;
	return true;
}

/* True if t is type/subtype; the subtype may end in a star. */
static bool
type_parse(struct text t)
{
	struct text type = text_split(&t, '/');

	return text_is_token(type) && text_find(type, '*') == type.len &&
	    text_is_token(t) && text_find(t, '*') + 1 >= t.len;
}

/* Parses >n or <n; as two values, nearly every size would match one. */
static bool
size_bound_parse(struct parser *p, const struct condition *c,
    struct value *value)
{
	struct numbers *r = &value->as.numbers;
	bool above = text_starts(value->text, ">");

	if (c->values != NULL &&
	    (c->values->as.numbers.last == UINT64_MAX) != above)
		parser_error(p,
		    "size: of > and < one is enough to match; write size >1M "
		    "size <5M for what is between");
	if ((!above && !text_starts(value->text, "<")) ||
	    !size_parse(text_from(value->text, 1), &r->first))
		return false;
	r->last = above ? UINT64_MAX : r->first - (r->first > 0);
	r->first = above ? r->first + 1 : r->first == 0;
	return true;
}

/* Parses a text to find in bodies; each takes one of NEEDLES_MAX places. */
static bool
needle_parse(struct parser *p, struct value *value)
{
	struct rules *rules = p->rules;

	value->as.needle = rules->needles_n;
	if (rules->needles_n == NEEDLES_MAX)
		parser_error(p, "body: more than %d texts", NEEDLES_MAX);
	else if (value->text.len == 0 || value->text.len > UCHAR_MAX)
		parser_error(p, "body: a text has 1 to 255 bytes");
	else
		rules->needles[rules->needles_n++] = value->text;
	return !p->bad;
}

/* Parses N%; each such value in the rules has a draw of its own. */
static bool
chance_parse(struct parser *p, struct text t, struct value *value)
{
	static const struct unit units[] = { { "%", 1 }, { "", 0 } };
	uint64_t share;

	if (!amount_parse(t, units, CHANCES, &share))
		return false;
	value->as.chance.share = (unsigned)share;
	value->as.chance.number = p->rules->chances++;
	return true;
}

/* Adds a file of domains; rules_read_lists() reads it after all rules. */
static bool
list_parse(struct parser *p, struct value *value)
{
	struct rules *rules = p->rules;
	struct list *list = rules->lists;

	while (list < rules->lists + rules->lists_n &&
	    !text_equals(value->text, text_of(list->path)))
		list++;
	value->as.list = list;
	if (list < rules->lists + rules->lists_n)
		return true;
	if (rules->lists_n == LISTS_MAX)
		parser_error(p, "list: more than %d files", LISTS_MAX);
	else if (access(value->text.at, R_OK) == -1)
		parser_error(p, "%s: %s", value->text.at, strerror(errno));
	else {
		list->path = value->text.at;
		list->where = parser_copy(p, text_of(p->where));
		list->fd = -1;
		rules->lists_n++;
	}
	return !p->bad;
}

/*
 * Parses one value: `word` and the words after it that belong to it.  False
 * if it is not valid for the subject.
 */
static bool
value_parse(struct parser *p, struct condition *c, const struct word *word,
    struct value *value)
{
	switch (c->subject) {
	case SUBJECT_CLIENT:
	case SUBJECT_ADDRESS:
		return network_parse(word->t, &value->as.network);
	case SUBJECT_USER:
		return word->quoted || strpbrk(word->t.at, "*,") == NULL;
	case SUBJECT_METHOD:
		return text_is_token(word->t) &&
		    (word->quoted ||
			strpbrk(word->t.at, "abcdefghijklmnopqrstuvwxyz*") ==
			    NULL);
	case SUBJECT_HOST:
		return host_parse(&value->text);
	case SUBJECT_LIST:
		return list_parse(p, value);
	case SUBJECT_PORT:
	case SUBJECT_STATUS:
		return numbers_parse(word->t, units_plain,
			   subjects[c->subject].max, &value->as.numbers) &&
		    value->as.numbers.first > 0;
	case SUBJECT_URL:
		return regex_parse(p, word->t.at, value);
	case SUBJECT_FIELD:
		return value_field(p, c, value);
	case SUBJECT_TIME:
		return time_parse(p, c, value);
	case SUBJECT_TYPE:
		c->name = text_of("Content-Type");
		return type_parse(word->t);
	case SUBJECT_SIZE:
		return size_bound_parse(p, c, value);
	case SUBJECT_BODY:
		return needle_parse(p, value);
	case SUBJECT_PAGE:
		return text_is(word->t, "status") ||
		    text_is(word->t, "metrics");
	case SUBJECT_CHANCE:
		return chance_parse(p, word->t, value);
	case SUBJECTS:
		break;
	}
	return false;
}

/* Parses the values of a condition, and lists them in reverse order. */
static void
condition_values(struct parser *p, struct condition *c)
{
	const struct word *word;

	while (!p->bad && (word = parser_take(p)) != NULL) {
		struct value *value = parser_new(p, sizeof(*value));

		if (value == NULL)
			return;
		value->text = word->t;
		value->any = !word->quoted &&
		    text_is(word->t, subjects[c->subject].any);
		if (!word->quoted &&
		    (text_is(word->t, "or") || text_is(word->t, "and")))
			parser_error(p,
			    "%s: values and conditions follow each other "
			    "without a word between them; write it in quotes "
			    "to make it a value",
			    word->t.at);
		else if (!value->any && !value_parse(p, c, word, value))
			parser_invalid(p, c->word, word,
			    subjects[c->subject].wants);
		value->next = c->values;
		c->values = value;
	}
	if (c->values == NULL)
		parser_missing(p, c->word);
	if (c->subject == SUBJECT_USER)
		parser_logins(p);
}

/*
 * Facts that are known in time: the route and the fields of a request can't
 * depend on the response, nor the caching and the fields of a response on its
 * body.  The groups that are left out wait for nothing.
 */
static const unsigned facts_timely[GROUPS] = {
	[GROUP_ACCESS] = FACTS,
	[GROUP_ROUTE] = FACT_ADDRESS,
	[GROUP_SOURCE] = FACT_ADDRESS,
	[GROUP_CACHE] = FACTS & ~FACT_BODY,
	[GROUP_REQUEST] = FACT_ADDRESS,
	[GROUP_RESPONSE] = FACTS & ~FACT_BODY,
};

/* Parses a condition, and adds it to the rule. */
static void
condition_parse(struct parser *p, struct rule *rule)
{
	struct condition *c = parser_new(p, sizeof(*c));
	struct condition **end = &rule->conditions;

	if (c == NULL)
		return;
	c->inverted = parser_takes(p, "not");
	c->subject = subject_next(p);
	if (c->subject == SUBJECTS) {
		parser_error(p, "%s: not a condition",
		    p->at < p->n ? p->words[p->at].t.at : "not");
		return;
	}
	p->at++;
	c->needs = subjects[c->subject].needs;
	c->word = subjects[c->subject].word;
	for (; *end != NULL; end = &(*end)->next)
		if (subjects[c->subject].single && !c->inverted &&
		    (*end)->subject == c->subject && !(*end)->inverted)
			parser_error(p,
			    "%s: two conditions can't both match; write all "
			    "values behind one, as in: %s a b",
			    c->word, c->word);
	*end = c;
	if (c->subject == SUBJECT_PAGE &&
	    (p->group != GROUP_ACCESS || rule->needs != 0))
		parser_error(p,
		    "page: it stands with allow, deny, login or drop, once, "
		    "and not with what needs a server");
	if (c->subject == SUBJECT_PAGE)
		p->group = GROUP_PAGE;
	if (c->subject != SUBJECT_CLIENT && p->group == GROUP_TRUST)
		parser_error(p, "trust: only client can stand here");
	condition_values(p, c);
	if (rule->action == ACTION_OFFLINE ? c->needs :
					     c->needs & ~facts_timely[p->group])
		parser_error(p,
		    "%s: what it needs is known too late for this rule; leave "
		    "it out",
		    c->word);
	rule->needs |= c->needs;
}

/* ---- 12. Rules: actions as text, files, trials ---- */

/*
 * Reads rules from files and options, and the lists and users that they name.
 * New rules are read beside those in force and replace them only if all are
 * right; an exchange keeps the rules that it began with.  A trial (-T) judges a
 * request that is never made.
 *
 * Door: rules_read, rules_step, rules_take, rules_try, rules_warn.
 */

/* Takes one argument of: deny [status] ["reason"] */
static bool
deny_take(struct parser *p, struct rule *rule, const struct word *word)
{
	uint64_t status;

	if (word->quoted && rule->words.at == NULL && word->t.len <= REASON_MAX)
		rule->words = word->t;
	else if (word == &p->words[1] && number_parse(word->t, 599, &status) &&
	    status >= 400)
		rule->status = (int)status;
	else
		return false;
	return true;
}

/* Decodes %XX in a user or password; false if it is too long or has a NUL. */
static bool
credential_parse(struct text t, char *to)
{
	size_t i, n = 0;

	for (i = 0; i < t.len && n < CREDENTIAL_MAX; i++) {
		int high = i + 2 < t.len && t.at[i] == '%' ?
		    hex_value(t.at[i + 1]) :
		    -1;
		int low = high >= 0 ? hex_value(t.at[i + 2]) : -1;

		if (low >= 0) {
			to[n++] = (char)(high << 4 | low);
			i += 2;
		} else
			to[n++] = t.at[i];
	}
	to[n] = '\0';
	return i == t.len && strlen(to) == n;
}

/*
 * Takes the login, up to the last @, off the front of t, and leaves the host.
 * Returns NULL or the error.
 */
static const char *
parent_login(struct text *t, struct parent *p)
{
	struct text login = *t;

	while (login.len > 0 && login.at[login.len - 1] != '@')
		login.len--;
	if (login.len == 0)
		return NULL;
	*t = text_from(*t, login.len--);
	p->login = true;
	if (!credential_parse(text_split(&login, ':'), p->user) ||
	    !credential_parse(login, p->password))
		return "a user or password of more than 255 bytes, or with %00";
	if (p->kind == PARENT_SOCKS &&
	    (p->user[0] == '\0' || p->password[0] == '\0'))
		return "SOCKS5 wants both a user and a password";
	if (p->kind == PARENT_HTTP && strchr(p->user, ':') != NULL)
		return "a user with a colon, which HTTP can't send";
	return NULL;
}

/*
 * Parses http:// or socks5://, [user:password@]host:port, into p, which is
 * zeroed.  Returns NULL or the error, which never shows the password.
 */
static const char *
parent_parse(struct text t, struct parent *p)
{
	static unsigned id;
	struct target target = { .host = { "", 0 } };
	const char *why;

	/* secret_hide_string() masks a login up to one of these. */
	if (strpbrk(t.at, " \t\"") != NULL)
		return "a blank or a quote in it; write it as %XX";
	p->id = ++id;
	p->kind = text_starts(t, "http://") ? PARENT_HTTP : PARENT_SOCKS;
	if (p->kind == PARENT_SOCKS && !text_starts(t, "socks5://") &&
	    !text_starts(t, "socks5h://"))
		return "it must begin with http:// or socks5://";
	t = text_from(t, text_find(t, '/') + 2);
	if (t.len > 0 && t.at[t.len - 1] == '/')
		t.len--;
	why = parent_login(&t, p);
	if (why != NULL)
		return why;
	if (authority_parse(t, p->kind == PARENT_HTTP ? 8080 : 1080, &target) !=
	    1)
		return "no valid host:port in it";
	(void)text_copy(target.host, p->host, sizeof(p->host));
	p->port = target.port;
	return NULL;
}

/* Takes one argument of: via URL ... [direct] */
static bool
via_take(struct parser *p, struct rule *rule, const struct word *word)
{
	struct parent *parent = parser_new(p, sizeof(*parent));
	struct parent **end = &rule->parents;
	const char *why = NULL;

	if (parent == NULL)
		return true;
	while (*end != NULL && (*end)->kind != PARENT_NONE)
		end = &(*end)->next;
	if (*end != NULL)
		why = "nothing goes behind `direct'";
	else if (rule->parents == NULL || !text_is(word->t, "direct"))
		why = parent_parse(word->t, parent);
	if (why != NULL)
		parser_error(p, "via: %s", why);
	*end = parent;
	return true;
}

/* Takes one argument of: from ADDRESS [ADDRESS] */
static bool
from_take(struct parser *p, struct rule *rule, const struct word *word)
{
	struct address a;

	(void)p;
	if (!address_parse(word->t, 0, &a) ||
	    rule->from[a.family == AF_INET6].family != 0)
		return false;
	rule->from[a.family == AF_INET6] = a;
	return true;
}

/* to HOST:PORT */
static bool
to_take(struct parser *p, struct rule *rule, const struct word *word)
{
	struct parent *parent = parser_new(p, sizeof(*parent));
	struct target t;

	if (parent == NULL || authority_parse(word->t, 0, &t) != 1)
		return false;
	(void)text_copy(host_trim(t.host), parent->host, sizeof(parent->host));
	parent->kind = PARENT_TO;
	parent->port = t.port;
	rule->parents = parent;
	return true;
}

/* answer STATUS [TYPE] "text", or file PATH at its end: one of them. */
static bool
answer_take(struct parser *p, struct rule *rule, const struct word *word)
{
	uint64_t status;

	if (rule->file != NULL || rule->words.at != NULL)
		return false;
	if (rule->status == 0) {
		rule->type = "text/plain; charset=utf-8";
		if (!number_parse(word->t, 599, &status) || status < 200)
			return false;
		rule->status = (int)status;
	} else if (word->quoted)
		rule->words = word->t;
	else if (text_is(word->t, "file") && p->at < p->n)
		rule->file = p->words[p->at++].t.at;
	else if (text_find(word->t, '/') < word->t.len)
		rule->type = word->t.at;
	else
		return false;
	return true;
}

/* cache TIME, delay TIME or TIME-TIME, rate BYTES, cut BYTES, limit N */
static bool
amount_take(struct parser *p, struct rule *rule, const struct word *word)
{
	bool ranges = rule->action == ACTION_DELAY;
	bool times = rule->action == ACTION_CACHE || ranges;

	(void)p;
	return (ranges || text_find(word->t, '-') == word->t.len) &&
	    numbers_parse(word->t, times ? units_time : units_size,
		times ? DURATION_MAX_MS : INT64_MAX, &rule->amount) &&
	    (rule->amount.first > 0 || times || rule->action == ACTION_CUT);
}

/* Takes one argument of: set|add NAME VALUE, or unset NAME ... */
static bool
rewrite_take(struct parser *p, struct rule *rule, const struct word *word)
{
	struct value *name;
	struct text t = word->t;

	if (rule->names != NULL && rule->action != ACTION_UNSET) {
		rule->field.name = rule->names->text;
		rule->field.value = text_trim(t);
		return true;
	}
	if (text_find(t, '*') + 1 < t.len)
		parser_error(p, "%s: a star stands at the end of a name", t.at);
	else if (!name_is_free(t))
		parser_error(p, "%s: no field that a rule may touch", t.at);
	else if (rule->action != ACTION_UNSET && text_find(t, '*') < t.len)
		parser_error(p, "only unset knows *");
	name = parser_new(p, sizeof(*name));
	if (name == NULL)
		return true;
	name->text = t;
	name->next = rule->names;
	rule->names = name;
	return true;
}

/*
 * The actions.  group: GROUP_REQUEST stands for both rewriting groups; min,
 * max: number of arguments; take: takes one, false if it is not valid; wants:
 * a description of them, for errors.  A new action is a row here, the place
 * that asks for its group, as bend_apply() does, and its text under Actions and
 * Grammar in the manual.
 */
static const struct {
	char word[8];
	enum rule_group group;
	size_t min, max;
	bool (*take)(struct parser *, struct rule *, const struct word *);
	const char *wants;
} actions[ACTIONS] = {
	[ACTION_ALLOW] = { "allow", GROUP_ACCESS, 0, 0, NULL, "" },
	[ACTION_DENY] = { "deny", GROUP_ACCESS, 0, 2, deny_take,
	    "a status from 400 to 599, and a reason in quotes, of 200 bytes" },
	[ACTION_LOGIN] = { "login", GROUP_ACCESS, 0, 0, NULL, "" },
	[ACTION_DROP] = { "drop", GROUP_ACCESS, 0, 0, NULL, "" },
	[ACTION_VIA] = { "via", GROUP_ROUTE, 1, WORDS_MAX, via_take, "a URL" },
	[ACTION_DIRECT] = { "direct", GROUP_ROUTE, 0, 0, NULL, "" },
	[ACTION_FROM] = { "from", GROUP_SOURCE, 1, WORDS_MAX, from_take,
	    "a numeric address, at most one of each family" },
	[ACTION_NOCACHE] = { "nocache", GROUP_CACHE, 0, 0, NULL, "" },
	[ACTION_CACHE] = { "cache", GROUP_CACHE, 1, 1, amount_take,
	    "a duration such as 90s, 15m, 1h or 7d" },
	[ACTION_OFFLINE] = { "offline", GROUP_CACHE, 0, 0, NULL, "" },
	[ACTION_TO] = { "to", GROUP_ROUTE, 1, 1, to_take,
	    "a server such as 127.0.0.1:8000" },
	[ACTION_ANSWER] = { "answer", GROUP_ANSWER, 2, 3, answer_take,
	    "a status from 200 to 599, and a text in quotes, or file and its "
	    "path; a type may stand before them" },
	[ACTION_HANG] = { "hang", GROUP_ANSWER, 0, 0, NULL, "" },
	[ACTION_DELAY] = { "delay", GROUP_DELAY, 1, 1, amount_take,
	    "a duration such as 500ms, or a range such as 100ms-2s" },
	[ACTION_RATE] = { "rate", GROUP_RATE, 1, 1, amount_take,
	    "bytes a second such as 56K" },
	[ACTION_LIMIT] = { "limit", GROUP_LIMIT, 1, 1, amount_take,
	    "a number of requests, from 1" },
	[ACTION_CUT] = { "cut", GROUP_CUT, 1, 1, amount_take,
	    "bytes such as 10K" },
	[ACTION_TRACE] = { "trace", GROUP_TRACE, 0, 0, NULL, "" },
	[ACTION_TRUST] = { "trust", GROUP_TRUST, 0, 0, NULL, "" },
	[ACTION_SET] = { "set", GROUP_REQUEST, 2, 2, rewrite_take,
	    "the name of a field and its value" },
	[ACTION_ADD] = { "add", GROUP_REQUEST, 2, 2, rewrite_take,
	    "the name of a field and its value" },
	[ACTION_UNSET] = { "unset", GROUP_REQUEST, 1, WORDS_MAX, rewrite_take,
	    "the name of a field" },
};

/* Takes an action's arguments: `min` words of any kind, then values. */
static void
arguments_parse(struct parser *p, struct rule *rule)
{
	enum action action = rule->action;
	size_t n;

	for (n = 0; !p->bad && n < actions[action].max; n++) {
		bool any = n < actions[action].min && p->at < p->n;
		const struct word *word = any ? &p->words[p->at++] :
						parser_take(p);

		if (word == NULL)
			break;
		if (!actions[action].take(p, rule, word))
			parser_invalid(p, actions[action].word, word,
			    actions[action].wants);
	}
	if (n < actions[action].min ||
	    (action == ACTION_ANSWER && rule->words.at == NULL &&
		rule->file == NULL))
		parser_error(p, "%s: a value is missing; write %s",
		    actions[action].word, actions[action].wants);
}

/*
 * Sets the group of a rule.  A rewriting rule says whether it applies to
 * requests or to responses; each of these groups has its limit.
 */
static void
action_group(struct parser *p, enum rule_group group)
{
	p->group = group;
	if (group != GROUP_REQUEST)
		return;
	if (parser_takes(p, "response"))
		p->group = GROUP_RESPONSE;
	else if (!parser_takes(p, "request"))
		parser_error(p, "`request' or `response' is missing");
	if (++p->rules->rewrites[p->group == GROUP_RESPONSE] > REWRITES_MAX)
		parser_error(p, "more than %d rules that rewrite these",
		    REWRITES_MAX);
}

/*
 * Parses a rule, which is split into words.  Messages show its line without
 * outer blanks and with passwords masked.
 */
static void
rule_parse(struct parser *p, struct text line)
{
	struct rule *rule = parser_new(p, sizeof(*rule));
	char *shown = parser_copy(p, text_trim(line));
	unsigned i = 0;

	while (i < ACTIONS && !parser_takes(p, actions[i].word))
		i++;
	if (i == ACTIONS)
		parser_error(p, "%s: not an action", p->words[0].t.at);
	if (p->bad)
		return;
	secret_hide_string(shown);
	rule->action = (enum action)i;
	rule->where = parser_copy(p, text_of(p->where));
	rule->built_in = p->file == built_in;
	rule->text = shown;
	rule->status = rule->action == ACTION_DENY ? 403 : 0;
	action_group(p, actions[i].group);
	if (rule->action == ACTION_LOGIN)
		parser_logins(p);
	arguments_parse(p, rule);
	while (!p->bad && p->at < p->n)
		condition_parse(p, rule);
	/* The built-in rule without conditions refuses foreign clients. */
	rule->refusal = rule->built_in && rule->conditions == NULL ?
	    REFUSE_FOREIGN :
	    rule->needs & FACT_ADDRESS ? REFUSE_GUARDED :
					 REFUSE_RULE;
	rule->next = *p->end[p->group];
	*p->end[p->group] = rule;
	p->end[p->group] = &rule->next;
}

/* True if t looks like a hash of crypt(3), htpasswd(1) or LDAP. */
static bool
secret_is_hash(struct text t)
{
	size_t n = 1;

	while (n < t.len && (is_alnum(t.at[n]) || t.at[n] == '-'))
		n++;
	return n > 1 && n < t.len &&
	    ((*t.at == '$' && t.at[n] == '$') ||
		(*t.at == '{' && t.at[n] == '}'));
}

/* Parses a line of users: `user:password`, a comment, or an empty line. */
static void
account_parse(struct parser *p, struct text line)
{
	size_t colon = text_find(line, ':');
	struct account *account;

	if (line.len == 0 || *line.at == '#')
		return;
	if (colon == 0 || colon == line.len || colon > CREDENTIAL_MAX ||
	    line.len - colon - 1 > CREDENTIAL_MAX)
		parser_error(p, "not user:password, of %d bytes each at most",
		    CREDENTIAL_MAX);
	else if (secret_is_hash(text_from(line, colon + 1)))
		parser_error(p,
		    "the password looks hashed; write the password itself, "
		    "which may not begin with $...$ or {...}");
	account = p->bad ? NULL : parser_new(p, sizeof(*account) + line.len);
	if (account == NULL)
		return;
	memcpy(account->line, line.at, line.len);
	account->password = text_cut(account->line, line.len);
	account->user = text_split(&account->password, ':');
	account->next = p->rules->accounts;
	p->rules->accounts = account;
}

/* True if t may be a line of rules or users; if not, reports an error. */
static bool
line_check(struct parser *p, struct text t)
{
	if (t.len > RULE_LINE_MAX)
		parser_error(p, "a line of more than %d bytes", RULE_LINE_MAX);
	else if (!text_is_clean(t))
		parser_error(p, "a control byte: this is no text");
	return !p->bad;
}

/*
 * Calls take() for each line of a file, until one is not text.  Nobody but the
 * owner may have access to a secret file.  Once the proxy serves, the file
 * must be a regular one, since reading a pipe may block.
 */
static void
file_read(struct parser *p, const char *path, bool secret,
    void (*take)(struct parser *, struct text))
{
	int got, fd = open(path, O_RDONLY | (rules_now ? O_NONBLOCK : 0));
	struct reader reader;
	struct stat status;
	struct text t;
	unsigned line = 0;
	bool good;

	reader_begin(&reader);
	if (fd == -1 || fstat(fd, &status) == -1)
		parser_error(p, "%.200s: %s", path, strerror(errno));
	else if (rules_now != NULL && !S_ISREG(status.st_mode))
		parser_error(p, "%.200s: not a file", path);
	else if (secret && (status.st_mode & (S_IRWXG | S_IRWXO)))
		parser_error(p, "others may read %.200s: chmod 600", path);
	for (good = !p->bad; good;) {
		parser_begin(p, path, ++line);
		got = reader_next(&reader, fd, &t);
		if (got == -1)
			parser_error(p, "%s", strerror(errno));
		good = got == 1 && line_check(p, t);
		if (good)
			take(p, t);
	}
	if (fd != -1)
		(void)close(fd);
}

/* Parses a checked line: a rule, `users`, `guard`, or an empty line. */
static void
line_parse(struct parser *p, struct text line)
{
	char *words = parser_copy(p, line);

	if (words == NULL || !parser_split(p, words) || p->n == 0)
		return;
	if (parser_takes(p, "users")) {
		p->rules->logins = true;
		if (p->n == 2)
			file_read(p, p->words[1].t.at, true, account_parse);
		else
			parser_error(p, "users: it wants the name of one file");
	} else if (!parser_takes(p, "guard"))
		rule_parse(p, line);
	else if (p->n > 1 || p->guard != NULL)
		parser_error(p, "guard: it stands alone, and once");
	else
		p->guard = p->end[GROUP_ACCESS];
}

/* Parses a rule from an option or a built-in rule. */
static void
line_take(struct parser *p, const char *file, unsigned line, const char *text)
{
	parser_begin(p, file, line);
	if (line_check(p, text_of(text)))
		line_parse(p, text_of(text));
}

/*
 * Reads the rules that options contain or imply.  In each group the first rule
 * that matches decides, so one that nothing may overrule must come first.
 */
static void
options_read(struct parser *p)
{
	unsigned i, lines = 0;
	char line[RULE_LINE_MAX + 2];

	for (i = 0; i < options.sources_n; i++) {
		if (options.sources[i].line) {
			line_take(p, "-e", ++lines, options.sources[i].at);
			continue;
		}
		parser_begin(p, "-f", 0);
		file_read(p, options.sources[i].at, false, line_parse);
	}
	if (options.via != NULL) {
		(void)snprintf(line, sizeof(line), "via %s", options.via);
		line_take(p, "-x", 0, line);
	}
	(void)snprintf(line, sizeof(line), "from %s %s",
	    options.from[0] ? options.from[0] : "",
	    options.from[1] ? options.from[1] : "");
	if (options.from[0] || options.from[1])
		line_take(p, "-b", 0, line);
	if (options.anonymous)
		line_take(p, "-a", 0,
		    "unset request Via From Referer User-Agent Forwarded "
		    "X-Forwarded* X-Real-IP Client-IP X-Client-IP "
		    "True-Client-IP X-Cluster-Client-IP X-Originating-IP "
		    "X-Remote-IP X-Remote-Addr X-ProxyUser-IP Proxy-Client-IP "
		    "CF-Connecting-IP Fastly-Client-IP X-UIDH");
}

/*
 * Adds the built-in rules: two after all others, and the two guards where
 * `guard` stands, or else before all others.
 */
static void
rules_built_in(struct parser *p)
{
	line_take(p, built_in, 3, "allow client local");
	line_take(p, built_in, 4, "deny \"this client may not use the proxy\"");
	line_take(p, built_in, 5, "allow client local page status metrics");
	line_take(p, built_in, 6,
	    "deny \"only clients on the proxy's machine may see this page\" "
	    "page status metrics");
	p->end[GROUP_ACCESS] = p->guard ? p->guard :
					  &p->rules->first[GROUP_ACCESS];
	line_take(p, built_in, 1,
	    "deny \"only clients on the proxy's machine may go to this "
	    "address\" not client local address 127.0.0.0/8 ::1 "
	    "0.0.0.0/8 :: 169.254.0.0/16 fe80::/10 224.0.0.0/3 ff00::/8");
	line_take(p, built_in, 2,
	    "deny \"CONNECT goes to port 443 only\" not client local "
	    "method CONNECT not port 443");
}

/*
 * Reads all rules into a new set.  Reports and counts errors; does not read
 * their lists yet.  NULL without memory.
 */
static struct rules *
rules_begin(void)
{
	static struct parser parser;
	struct rules *rules = calloc(1, sizeof(*rules));
	unsigned i;

	if (rules == NULL) {
		warn("no memory for new rules");
		return NULL;
	}
	rules->refs = 1;
	parser.rules = rules;
	parser.guard = NULL;
	for (i = 0; i < GROUPS; i++)
		parser.end[i] = &rules->first[i];
	options_read(&parser);
	rules_built_in(&parser);
	return rules;
}

/*
 * Reads lists for LIST_STEP_US at most: a large list takes many turns of the
 * loop, so that no exchange waits for it.  True when all were read.
 */
static bool
rules_read_lists(struct rules *rules)
{
	int64_t until = clock_us() + LIST_STEP_US;

	while (rules->lists_read < rules->lists_n && clock_us() < until) {
		struct list *list = &rules->lists[rules->lists_read];
		int got = list_step(list);

		if (got == 0)
			continue;
		rules->lists_read++;
		rules->errors += got == -1;
		list_end(list);
		if (got == -1)
			warn("%s: %s: %s", list->where, list->path, list_why);
		else
			warn("%s: %lu lines, %lu domains, %lu skipped, %ld ms",
			    list->path, (unsigned long)list->read,
			    (unsigned long)list->used,
			    (unsigned long)list->skipped, (long)list->ms);
	}
	return rules->lists_read == rules->lists_n;
}

/*
 * Continues to read rules; the new ones come into force when all were read.
 * True if there is more to read.
 */
static bool
rules_step(void)
{
	struct rules *old;

	if (rules_next == NULL || !rules_read_lists(rules_next))
		return rules_next != NULL;
	if (rules_next->errors == 0) {
		old = rules_now;
		rules_now = rules_next;
		rules_next = old;
	} else if (rules_now != NULL)
		warn("the old rules stay in force");
	rules_give(&rules_next);
	return false;
}

/*
 * Reads all rules: at startup at once, and for -n -v also prints them, group by
 * group; later rules_step() does it, and those in force stay meanwhile.  False
 * if there are none, as there were errors, which were reported.
 */
static bool
rules_read(void)
{
	bool first = rules_now == NULL;
	bool print = first && options.check && options.verbose > 0;
	const struct rule *rule;
	unsigned i;

	rules_give(&rules_next);
	rules_next = rules_begin();
	while (first && rules_step())
		continue;
	for (i = 0; i < GROUPS && rules_now != NULL && print; i++)
		for (rule = rules_now->first[i]; rule; rule = rule->next)
			printf("%s: %s\n", rule->where, rule->text);
	return rules_now != NULL;
}

/*
 * Warns of what the rules do not do: be read again by the user of -u, at HUP;
 * and let clients in that could come from other machines (exposed).
 */
static void
rules_warn(bool exposed)
{
	struct rules *rules = options.user ? rules_begin() : NULL;

	if (options.user && (rules == NULL || rules->errors > 0))
		warn("user %s can't read the rules again: HUP will not change "
		     "them",
		    options.user);
	rules_give(&rules);
	if (exposed && !rules_let_in())
		warn(
		    "clients that are not on this machine are refused until "
		    "a rule lets them in, as in: -e 'allow client 10.0.0.0/8'");
}

/*
 * Sets the rules of x to those in force, until rules_give(); and its user, if
 * there are users: the one who logged in, or NULL.
 */
static void
rules_take(struct exchange *x)
{
	x->rules = rules_now;
	rules_now->refs++;
	if (rules_now->logins)
		x->record.user = account_login(rules_now, &x->request->head);
}

/* ---- trials ---- */

/* A -T: a request that is judged, but never made. */
struct trial {
	struct exchange x;            /* with this request */
	struct request request;       /* of a zero dice */
	const struct address *server; /* x's, if it was looked up, or NULL */
	struct verdict access, route;
};

/*
 * Reads the words of a -T: a URL, and behind it `client ADDRESS`, `user NAME`,
 * `method NAME`.
 */
static void
trial_parse(struct trial *t, const char *words)
{
	static struct account user;
	struct text rest = text_trim(text_of(words));
	struct exchange *x = &t->x;
	struct request *q = &t->request;

	memset(t, 0, sizeof(*t));
	x->request = q;
	x->rules = rules_now;
	(void)address_parse(text_of("127.0.0.1"), 0, &x->peer);
	q->minor = 1;
	q->name = text_of("GET");
	q->uri = word_next(&rest);
	while (rest.len > 0) {
		struct text word = word_next(&rest);
		struct text value = word_next(&rest);

		if (text_is(word, "user") && value.len > 0) {
			user.user = value;
			x->record.user = &user;
		} else if (text_is(word, "method") && text_is_token(value))
			q->name = value;
		else if (!text_is(word, "client") ||
		    !address_parse(value, 0, &x->peer))
			usage("-T %.*s: %.*s %.*s is none of: client ADDRESS, "
			      "user NAME, method NAME",
			    (int)q->uri.len, words, (int)word.len, word.at,
			    (int)value.len, value.at);
	}
	q->method = method_parse(q->name);
	if (!url_parse(q->uri, &q->target) ||
	    (q->method == METHOD_CONNECT && q->target.form == FORM_ABSOLUTE))
		usage("-T %.*s: not a URL that begins with http://, or with "
		      "https:// for CONNECT",
		    (int)q->uri.len, words);
	if (q->target.form == FORM_AUTHORITY) {
		q->method = METHOD_CONNECT;
		q->name = text_of("CONNECT");
	}
	x->local = address_is_local(&x->peer);
}

/* Prints a verdict, and the rule that it comes from. */
static void
trial_print(const char *what, const char *word, const struct rule *rule)
{
	printf("\t%s: %s", what, word);
	if (rule != NULL)
		printf(" (%s: %s)", rule->where, rule->text);
	printf("\n");
}

/*
 * Judges access by what is known, and the route at first and while it is
 * undecided.  A parent looks the server's name up itself, so the address stays
 * unknown unless the route needed it; a rule `to' leads to another server.
 */
static void
trial_judge(struct trial *t)
{
	struct route *route = &t->request.route;

	if (t->server == NULL || t->route.undecided != NULL) {
		t->route = rules_judge(&t->x, GROUP_ROUTE, NULL, t->server);
		route->parent = t->route.rule ? t->route.rule->parents : NULL;
		if (route->parent != NULL && route->parent->kind == PARENT_TO) {
			t->x.record.server.family = 0;
			t->server = NULL;
		}
	}
	t->access = rules_judge(&t->x, GROUP_ACCESS, NULL, t->server);
}

/*
 * Looks up the server's name and judges again: the route by the first address,
 * access by that, and while it is denied by the next.  False, after saying why,
 * if there is none.
 */
static bool
trial_resolve(struct trial *t)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM };
	struct addrinfo *found = NULL, *at;
	const struct parent *to = t->request.route.parent;
	char host[HOST_MAX + 1];
	int error;

	(void)text_copy(to != NULL && to->kind == PARENT_TO ?
		text_of(to->host) :
		t->request.target.host,
	    host, sizeof(host));
	error = getaddrinfo(host, NULL, &hints, &found);
	if (error != 0) {
		printf("\taddress: the name lookup failed: %s\n",
		    gai_strerror(error));
		return false;
	}
	at = found;
	do {
		t->x.record.server = address_import(at->ai_addr);
		address_settle(&t->x.record.server);
		t->server = &t->x.record.server;
		trial_judge(t);
		at = at->ai_next;
	} while (at != NULL && t->access.refuses && t->server != NULL &&
	    exchange_parent(&t->x) == NULL);
	freeaddrinfo(found);
	return true;
}

/*
 * True if a verdict is undecided for lack of the server's address, and the
 * request is not denied in any case.
 */
static bool
trial_needs_address(const struct trial *t)
{
	const struct rule *rule = rules_now->first[GROUP_ACCESS];
	struct view v;

	if (t->access.refuses || t->route.undecided != NULL)
		return !t->access.refuses;
	exchange_view(&t->x, NULL, t->server, &v);
	if (t->access.undecided == NULL || ((v.known | v.never) & FACT_ADDRESS))
		return false;
	while (rule != NULL &&
	    (!(rule->needs & FACT_ADDRESS) ||
		rule_judge(rule, &v) != TRUTH_UNDECIDED))
		rule = rule->next;
	return rule != NULL;
}

/* Prints the route: the first of its parents, without the login. */
static void
trial_route(const struct trial *t)
{
	const struct parent *p = t->request.route.parent;
	char place[HOST_MAX + 10], words[HOST_MAX + 40] = "direct";

	if (t->route.undecided != NULL)
		(void)snprintf(words, sizeof(words),
		    "undecided, it needs the server's address");
	if (p != NULL && p->kind != PARENT_NONE) {
		authority_print(text_of(p->host), p->port, true, place);
		(void)snprintf(words, sizeof(words), "%s%s",
		    p->kind == PARENT_TO       ? "to " :
			p->kind == PARENT_HTTP ? "via http://" :
						 "via socks5://",
		    place);
	}
	trial_print("route", words,
	    t->route.rule ? t->route.rule : t->route.undecided);
}

/* Prints whether the request is let in; if undecided, what is missing. */
static void
trial_access(const struct trial *t)
{
	const struct rule *rule = t->access.rule;
	const struct condition *c;
	struct view v;
	char words[80];

	if (rule != NULL) {
		trial_print("access", actions[rule->action].word, rule);
		return;
	}
	rule = t->access.undecided;
	assert(rule != NULL);
	exchange_view(&t->x, NULL, t->server, &v);
	for (c = rule->conditions; condition_judge(c, &v) != TRUTH_UNDECIDED;)
		c = c->next;
	(void)snprintf(words, sizeof(words), "undecided, it needs the %s%s",
	    c->needs & FACT_ADDRESS ? "server's " : "response's ", c->word);
	trial_print("access", words, rule);
}

/*
 * One -T: prints what would happen.  The server's name is looked up if, and
 * only if, a verdict depends on its address.  Returns the exit status.
 */
static int
trial_run(const char *words)
{
	const struct rule *rule;
	struct trial t;
	size_t at = 0;

	printf("%s\n", words);
	trial_parse(&t, words);
	trial_judge(&t);
	/* The address may lead `to' another server. */
	while (trial_needs_address(&t) && trial_resolve(&t))
		continue;
	trial_access(&t);
	trial_route(&t);
	if (t.access.refuses)
		return 1;
	/* Also what would bend it by chance. */
	while ((rule = rules_bend(&t.x, &at)) != NULL)
		trial_print("bent", actions[rule->action].word, rule);
	return t.access.rule == NULL || t.route.undecided != NULL ? 3 : 0;
}

/*
 * Tries the rules with each -T, and ends the program; of the exit statuses 1
 * goes before 3.
 */
static void
rules_try(void)
{
	int worst = 0;
	size_t i;

	for (i = 0; i < options.trials.n; i++) {
		int status = trial_run(options.trials.at[i]);

		if (worst == 0 || status == 1)
			worst = status;
	}
	exit(worst);
}

/* ---- 13. Freshness: what RFC 9111 lets a shared cache do ---- */

/*
 * Functions without state that judge heads and times: may a response be
 * stored, how long is it fresh, may it be reused for this request, does it
 * meet the client's conditions, and which part of it does a Range ask for.
 *
 * Sections 13 to 17 are a chapter.  A request looks for an entry (cache_find),
 * which answers like a server (cache_shape).  A response validates an entry
 * (cache_validate), or becomes one (cache_store, cache_append), perhaps without
 * its client (cache_wants, cache_detach).  At the end comes cache_leave().
 *
 * Door of sections 13 to 17: cache_append, cache_detach, cache_fields_append,
 * cache_find, cache_leave, cache_shape, cache_store, cache_validate,
 * cache_wants, store_open, store_print, store_sweep.
 *
 * Door: control_parse, freshness_lifetime, initial_age, modified_strong,
 * personal_statuses, range_parse, request_is_met, request_is_satisfied,
 * response_is_same, response_obstacle, reuse_judge, reuse_on_error,
 * status_is_among.
 */

enum {
	/* A heuristic freshness lifetime is at most a day. */
	HEURISTIC_MAX_S = 86400,
	/* An entry dated further in the future proves a wrong clock. */
	CLOCK_STEP_S = 60
};

/* A head's Cache-Control (RFC 9111 section 5.2); numbers: -1 if absent. */
struct control {
	bool no_store, no_cache;      /* in requests and responses */
	bool is_private, is_public;   /* in responses, as all to max_age */
	bool must_revalidate;         /* never to be served stale */
	bool proxy_revalidate;        /* the same, but see section 3.5 */
	bool must_understand;         /* overrides no-store */
	bool only_if_cached;          /* in requests */
	int64_t max_age;              /* seconds, as all that follow */
	int64_t s_maxage;             /* in responses */
	int64_t min_fresh, max_stale; /* in requests */
	int64_t while_revalidate;     /* in responses (RFC 5861) */
	int64_t if_error;             /* in both */
};

/* How a stored response may be used. */
enum reuse {
	REUSE_FRESH,     /* it answers */
	REUSE_STALE,     /* it answers, though stale */
	REUSE_MEANWHILE, /* it answers while it is revalidated */
	REUSE_VALIDATED  /* ask the server first */
};

/* How long a response is fresh. */
struct lifetime {
	int64_t seconds; /* since generation; -1: unknown */
	const char *why; /* its source, for the trace */
};

/* A part of a body. */
struct range {
	uint64_t first;  /* position of its first byte */
	uint64_t length; /* in bytes */
};

/*
 * Days from 1970 to a date.  Here the year begins in March, after a leap day;
 * so month 13 is the next January.
 */
static int64_t
days_from_date(int64_t year, int64_t month, int64_t day)
{
	int64_t march = month > 2 ? month - 3 : month + 9;

	year -= month <= 2;
	return year * 365 + year / 4 - year / 100 + year / 400 +
	    (153 * march + 2) / 5 + day - 719469;
}

/* The parts of a date: array indices. */
enum date_part {
	YEAR,
	MONTH,
	DAY,
	HOUR,
	MINUTE,
	SECOND,
	DATE_PARTS
};

/*
 * Parses t into parts, which are 0 before.  True if t matches the form, in
 * which a lower-case letter is a digit of a part, `ooo` a month's name, `_` a
 * digit of the day or a blank, and any other character itself.
 */
static bool
date_match(struct text t, const char *form, int64_t *parts)
{
	static const char letters[] = "yodhms";

	if (t.len != strlen(form))
		return false;
	for (; *form != '\0'; form++, t = text_from(t, 1)) {
		char want = *form != '_' ? *form : is_digit(*t.at) ? 'd' : ' ';
		const char *letter = strchr(letters, want);

		if (want == 'o') {
			parts[MONTH] = 1 +
			    name_index(t,
				"JanFebMarAprMayJunJulAugSepOctNovDec", 12);
			form += 2;
			t = text_from(t, 2);
		} else if (letter != NULL && is_digit(*t.at))
			parts[letter - letters] =
			    parts[letter - letters] * 10 + *t.at - '0';
		else if (letter != NULL || strncasecmp(t.at, &want, 1) != 0)
			return false;
	}
	return true;
}

/* The seconds from 1970 to a date. */
static int64_t
date_seconds(const int64_t *parts)
{
	return days_from_date(parts[YEAR], parts[MONTH], parts[DAY]) * DAY_S +
	    parts[HOUR] * 3600 + parts[MINUTE] * 60 + parts[SECOND];
}

/*
 * A date in one of the three forms of RFC 9110 section 5.6.7, exactly; else -1.
 * With a two-digit year, a date more than 50 years ahead is past.
 */
static int64_t
date_parse(struct text t)
{
	int64_t d[DATE_PARTS] = { 0 };
	size_t comma = text_find(t, ',');
	const char *form = comma == t.len ? " ooo _d hh:mm:ss yyyy" :
	    comma == 3                    ? ", dd ooo yyyy hh:mm:ss GMT" :
					    ", dd-ooo-yy hh:mm:ss GMT";

	if (name_index(t, "SunMonTueWedThuFriSat", 7) == -1 || comma == 4 ||
	    comma == 5 ||
	    !date_match(text_from(t, comma == t.len ? 3 : comma), form, d))
		return -1;
	if (comma != t.len && comma != 3) {
		/* 50 years before it, the last such date is past. */
		for (d[YEAR] += 1850; date_seconds(d) <= now.wall;)
			d[YEAR] += 100;
		d[YEAR] -= 50;
	}
	if (d[YEAR] < 1970 || d[MONTH] < 1 || d[DAY] < 1 ||
	    d[DAY] > days_from_date(d[YEAR], d[MONTH] + 1, 1) -
		    days_from_date(d[YEAR], d[MONTH], 1) ||
	    d[HOUR] > 23 || d[MINUTE] > 59 || d[SECOND] > 60)
		return -1;
	return date_seconds(d);
}

/* The date in a field; -1 if it is missing, repeated or malformed. */
static int64_t
head_date(const struct head *h, const char *name)
{
	size_t i = field_find(h, name, 0);

	return i == h->n || field_find(h, name, i + 1) < h->n ?
	    -1 :
	    date_parse(field_value(h, i));
}

/*
 * Parses delta-seconds (RFC 9111 1.2.2), which may be quoted (5.2): 2^31 if
 * too large, 0 if wrong.
 */
static int64_t
seconds_parse(struct text t)
{
	uint64_t value = 0;

	if (t.len > 1 && t.at[0] == '"' && t.at[t.len - 1] == '"')
		t = text_cut(t.at + 1, t.len - 2);
	(void)number_clamp(t, (uint64_t)INT32_MAX + 1, &value);
	return (int64_t)value;
}

/* Where the directives are in struct control; some are numbers of seconds. */
static const struct {
	char name[24];
	bool seconds;
	size_t at;
} directives[] = {
	{ "no-store", false, offsetof(struct control, no_store) },
	{ "no-cache", false, offsetof(struct control, no_cache) },
	{ "private", false, offsetof(struct control, is_private) },
	{ "public", false, offsetof(struct control, is_public) },
	{ "must-revalidate", false, offsetof(struct control, must_revalidate) },
	{ "proxy-revalidate", false,
	    offsetof(struct control, proxy_revalidate) },
	{ "must-understand", false, offsetof(struct control, must_understand) },
	{ "only-if-cached", false, offsetof(struct control, only_if_cached) },
	{ "max-age", true, offsetof(struct control, max_age) },
	{ "s-maxage", true, offsetof(struct control, s_maxage) },
	{ "min-fresh", true, offsetof(struct control, min_fresh) },
	{ "max-stale", true, offsetof(struct control, max_stale) },
	{ "stale-while-revalidate", true,
	    offsetof(struct control, while_revalidate) },
	{ "stale-if-error", true, offsetof(struct control, if_error) },
};

/* Adds the directive t to control; max-stale alone allows any staleness. */
static void
control_set(struct control *control, struct text t)
{
	struct text name = text_until(t, "=");
	int64_t given = text_is(t, "max-stale") ? INT32_MAX : 0, *seconds;
	size_t i;

	if (name.len < t.len)
		given = seconds_parse(text_from(t, name.len + 1));
	for (i = 0; i < sizeof(directives) / sizeof(directives[0]); i++) {
		void *member = (char *)control + directives[i].at;

		if (!text_is(name, directives[i].name))
			continue;
		seconds = member;
		if (!directives[i].seconds)
			*(bool *)member = true;
		else if (*seconds == -1 || given < *seconds)
			*seconds = given;
	}
}

/*
 * All Cache-Control of a head (RFC 9111 section 5.2).  A repeated directive
 * counts with its smallest value; Pragma counts only without Cache-Control
 * (section 5.4).
 */
static struct control
control_parse(const struct head *h)
{
	struct control control = { .max_age = -1,
		.s_maxage = -1,
		.min_fresh = -1,
		.max_stale = -1,
		.while_revalidate = -1,
		.if_error = -1 };
	struct members m = { 0, { "", 0 } };
	struct text directive;

	while (member_next(h, "Cache-Control", &m, &directive))
		control_set(&control, directive);
	if (!head_has(h, "Cache-Control") &&
	    head_lists(h, "Pragma", text_of("no-cache")))
		control.no_cache = true;
	return control;
}

/* Heuristically cacheable statuses (RFC 9110 section 15.1). */
static const int heuristic_statuses[] = { 200, 203, 204, 300, 301, 308, 404,
	405, 410, 414, 501, 0 };

/* Statuses caused by a request's fields or timing. */
static const int personal_statuses[] = { 304, 401, 407, 408, 412, 413, 416, 417,
	425, 428, 429, 431, 0 };

/* True if the list, which ends with 0, contains status. */
static bool
status_is_among(int status, const int *list)
{
	while (*list != 0 && *list != status)
		list++;
	return *list != 0;
}

/* True if the proxy knows what the status means. */
static bool
status_is_understood(int status)
{
	return status_is_among(status, heuristic_statuses) ||
	    (status >= 300 && status <= 308) ||
	    (status >= 400 && status <= 417) || status == 451 ||
	    (status >= 500 && status <= 505);
}

/*
 * The freshness lifetime (RFC 9111 sections 4.2.1 and 4.2.2); control is that
 * of the response.  explicit_only: no heuristic.
 */
static struct lifetime
freshness_lifetime(const struct response *r, const struct control *control,
    bool explicit_only)
{
	struct lifetime l = { -1, "nothing says how long" };
	int64_t date, expires, modified;

	if (control->s_maxage >= 0)
		return (struct lifetime){ control->s_maxage, "s-maxage" };
	if (control->max_age >= 0)
		return (struct lifetime){ control->max_age, "max-age" };
	date = head_date(&r->head, "Date");
	expires = head_date(&r->head, "Expires");
	modified = head_date(&r->head, "Last-Modified");
	if (head_has(&r->head, "Expires")) {
		if (date == -1)
			date = now.wall;
		return (struct lifetime){ expires > date ? expires - date : 0,
			"Expires" };
	}
	if (explicit_only || modified == -1 || date <= modified ||
	    (!status_is_among(r->status, heuristic_statuses) &&
		!control->is_public) ||
	    head_has(&r->head, "Set-Cookie"))
		return l;
	l.seconds = least((date - modified) / 10, HEURISTIC_MAX_S);
	l.why = "a tenth of the time since Last-Modified";
	return l;
}

/* True if the request has Authorization, its own or from a rule. */
static bool
request_has_login(const struct request *q)
{
	bool has = head_has(&q->head, "Authorization");
	size_t i;

	for (i = 0; i < q->rewrites.n; i++)
		has = has ||
		    text_is(q->rewrites.fields[i]->name, "Authorization");
	return has;
}

/*
 * Why the response may not be stored, in a word for the log, or NULL if it may
 * (RFC 9111 section 3).  A response to POST may if it says that it is also the
 * response to GET (RFC 9110 section 9.3.3); a part of a body may, for requests
 * for just that part; a HEAD is judged as the GET that it is about.  given: the
 * lifetime in seconds if a rule sets it, else -1.
 */
static const char *
response_obstacle(const struct request *q, const struct response *r,
    int64_t given)
{
	struct text located = head_value(&r->head, "Content-Location");
	struct control asked = control_parse(&q->head);
	struct control control = control_parse(&r->head);
	bool validator = head_has(&r->head, "ETag") ||
	    head_date(&r->head, "Last-Modified") != -1;
	bool guess = control.is_public ||
	    status_is_among(r->status, heuristic_statuses);
	int64_t lifetime = freshness_lifetime(r, &control, true).seconds;

	if (q->method != METHOD_GET && q->method != METHOD_HEAD &&
	    (q->method != METHOD_POST || r->status != 200 || lifetime <= 0 ||
		located.len == 0 ||
		(!text_equals(located, q->uri) &&
		    !text_equals(located, q->target.path))))
		return "method";
	if (r->status < 200 || status_is_among(r->status, personal_statuses) ||
	    (control.must_understand && !status_is_understood(r->status)))
		return "status";
	if (r->mended & MEND_OLD)
		return "framing";
	if (asked.no_store || (control.no_store && !control.must_understand))
		return "no-store";
	if (control.is_private)
		return "private";
	if (head_lists(&r->head, "Vary", text_of("*")))
		return "vary-*";
	if (r->status == 206 &&
	    (head_has(&r->head, "Vary") || !head_has(&q->head, "Range")))
		return "range";
	if (request_has_login(q) && !control.is_public &&
	    control.s_maxage < 0 && !control.must_revalidate)
		return "authorization";
	if (head_has(&r->head, "Set-Cookie") && lifetime <= 0)
		return "set-cookie";
	if (given >= 0 && (lifetime >= 0 || guess))
		lifetime = given;
	if (lifetime > 0 || (validator && (lifetime == 0 || guess)))
		return NULL;
	return lifetime < 0 && !guess ? "status" : "no-lifetime";
}

/*
 * The age of a response on arrival, in seconds (RFC 9111 section 4.2.3); only
 * the first Age counts, and only if it is a number.
 */
static int64_t
initial_age(const struct response *r, int64_t requested, int64_t responded)
{
	int64_t date = head_date(&r->head, "Date");
	int64_t apparent = date != -1 && responded > date ? responded - date :
							    0;
	struct text rest = head_value(&r->head, "Age"), member;
	int64_t age = list_next(&rest, &member) ? seconds_parse(member) : 0;

	age += responded - requested;
	return age > apparent ? age : apparent;
}

/*
 * How a stored response may be used now (RFC 9111 section 4.2).  age and
 * lifetime are the response's own, in seconds.
 */
static enum reuse
reuse_judge(const struct control *asked, const struct control *control,
    int64_t age, int64_t lifetime)
{
	bool strict = control->must_revalidate || control->proxy_revalidate ||
	    control->s_maxage >= 0;
	bool young = asked->max_age < 0 || age <= asked->max_age;
	int64_t stale = age - (lifetime > 0 ? lifetime : 0);

	/* max-age=0 asks for validation, however young the entry is. */
	if (asked->no_cache || asked->max_age == 0 || control->no_cache)
		return REUSE_VALIDATED;
	if (age < lifetime && young && lifetime - age >= asked->min_fresh)
		return REUSE_FRESH;
	if (strict || !young)
		return REUSE_VALIDATED;
	if (stale >= 0 && stale <= control->while_revalidate &&
	    asked->min_fresh < 0)
		return REUSE_MEANWHILE;
	if (stale >= 0 && stale <= asked->max_stale)
		return REUSE_STALE;
	return REUSE_VALIDATED;
}

/* True if a stale response may replace an error (RFC 9111 4.2.4, RFC 5861). */
static bool
reuse_on_error(const struct control *asked, const struct control *control,
    int64_t stale, bool answered)
{
	int64_t window = control->if_error > asked->if_error ?
	    control->if_error :
	    asked->if_error;

	if (control->must_revalidate || control->proxy_revalidate ||
	    control->s_maxage >= 0 || control->no_cache || asked->no_cache)
		return false;
	return window >= 0 ? stale <= window : !answered;
}

/*
 * Last-Modified if it is a strong validator, else empty: the payload might
 * change again in the same second (RFC 9110 section 8.8.2.2).
 */
static struct text
modified_strong(const struct head *h)
{
	int64_t modified = head_date(h, "Last-Modified");
	int64_t date = head_date(h, "Date");

	return modified != -1 && modified < (date == -1 ? now.wall : date) ?
	    head_value(h, "Last-Modified") :
	    text_of("");
}

/* An entity tag without the mark of a weak one. */
static struct text
tag_weak(struct text tag)
{
	return text_starts(tag, "W/") ? text_from(tag, 2) : tag;
}

/*
 * True if a 304 is about the stored response: their entity tags are the same,
 * or without these their dates, if both have them (RFC 9111 section 4.3.4).
 */
static bool
response_is_same(const struct response *news, const struct response *old)
{
	struct text tag = head_value(&news->head, "ETag"),
		    had = head_value(&old->head, "ETag");
	struct text date = head_value(&news->head, "Last-Modified"),
		    was = head_value(&old->head, "Last-Modified");

	if (tag.len > 0 && had.len > 0)
		return text_equals(tag_weak(tag), tag_weak(had));
	if (date.len > 0 && was.len > 0)
		return text_equals(date, was);
	return tag.len == 0;
}

/*
 * Looks for an entity tag in a request's fields of that name.  Returns 1 if
 * they contain it or `*`, 0 if not, -1 if there are no such fields.  The
 * comparison is weak or strong (RFC 9110 section 8.8.3.2).
 */
static int
condition_has(const struct head *q, const char *name, struct text etag,
    bool weak)
{
	struct members m = { 0, { "", 0 } };
	struct text member;

	if (weak)
		etag = tag_weak(etag);
	while (member_next(q, name, &m, &member))
		if (text_is(member, "*") ||
		    (etag.len > 0 && !text_starts(etag, "W/") &&
			text_equals(weak ? tag_weak(member) : member, etag)))
			return 1;
	return !head_has(q, name) ? -1 : 0;
}

/*
 * True if the stored response meets the request's If-Match or
 * If-Unmodified-Since.  If not, only the server may say so (RFC 9111 section
 * 4.3.2).
 */
static bool
request_is_met(const struct head *q, const struct response *r)
{
	int64_t since = head_date(q, "If-Unmodified-Since");
	int verdict =
	    condition_has(q, "If-Match", head_value(&r->head, "ETag"), false);

	if (verdict != -1)
		return verdict == 1;
	return since == -1 || head_date(&r->head, "Last-Modified") <= since;
}

/*
 * True if the client already has the stored response: the answer is 304 (RFC
 * 9110 section 13.2.2; If-None-Match takes precedence over If-Modified-Since).
 */
static bool
request_is_satisfied(const struct head *q, const struct response *r)
{
	int64_t since = head_date(q, "If-Modified-Since"), modified;
	int verdict = condition_has(q, "If-None-Match",
	    head_value(&r->head, "ETag"), true);

	if (verdict != -1 || since == -1)
		return verdict == 1;
	modified = head_date(&r->head, "Last-Modified");
	if (modified == -1)
		modified = head_date(&r->head, "Date");
	return modified != -1 && modified <= since;
}

/*
 * Parses the one range that a request asks for, of a body of so many bytes (RFC
 * 9110 section 14.1.2).  Returns 1: range is set; 0: send the whole body; -1:
 * it can't be satisfied.  An empty body satisfies a suffix and `bytes=0-`,
 * which some clients always send.
 */
static int
range_parse(const struct head *q, const struct response *r, uint64_t body,
    struct range *range)
{
	struct text t = head_value(q, "Range"), from, to;
	struct text condition = head_value(q, "If-Range");
	uint64_t first, last = UINT64_MAX;
	size_t dash = text_find(t, '-');

	if (!text_starts(t, "bytes=") || r->status != 200 || dash == t.len ||
	    text_find(t, ',') < t.len)
		return 0;
	if (condition.len > 0 &&
	    (text_starts(condition, "W/") ||
		(!text_equals(condition, head_value(&r->head, "ETag")) &&
		    !text_equals(condition, modified_strong(&r->head)))))
		return 0;
	from = text_from(text_cut(t.at, dash), strlen("bytes="));
	to = text_from(t, dash + 1);
	if (!number_parse(from.len ? from : to, INT64_MAX, &first))
		return 0;
	if (from.len == 0 && first == 0)
		return -1;
	if (from.len == 0)
		first = first < body ? body - first : 0;
	else if (to.len > 0 &&
	    (!number_parse(to, INT64_MAX, &last) || last < first))
		return 0;
	if (body == 0 && first == 0 && last == UINT64_MAX)
		return 0;
	if (first >= body)
		return -1;
	range->first = first;
	range->length = (last < body ? last + 1 : body) - first;
	return 1;
}

/* ---- 14. Store: entries in a directory ---- */

/*
 * Each entry is one file, which describes itself in text and whose name is a
 * hash of its key.  There is no index: open(2) is the lookup, and any file may
 * vanish at any time.  A sweeper, a child process, keeps the directory as small
 * as -s says; it has a section of its own.
 *
 * A damaged or truncated entry is a miss, not an error.  The directory never
 * takes more of the disk than -s allows, and a disk failure costs a client a
 * miss, or a follower a response that is visibly truncated.
 *
 * Door: disk_bytes, disk_failed, entry_find, entry_open, entry_path,
 * entry_read, entry_response, entry_touch, key_hash, key_of, marker_token,
 * region_build, region_seal, response_is_personal, stock, stock_sum, store,
 * store_bytes, store_fits, store_lacks_disk, store_path, store_remove,
 * store_tag, stored_head_append, tag_make, temporary_close, temporary_open,
 * temporary_place, variant_fits, variant_of, vary_append, work_buffer,
 * write_at.
 */

enum {
	/* A region's length is a multiple of this, with some to spare. */
	CACHE_BLOCK = 512,
	CACHE_SPARE = 256,
	/* Bytes of a path in the cache. */
	CACHE_PATH = 1024,
	/* Members of Vary; with more, a response is not stored. */
	VARY_MAX = 16,
	/* Bytes of an entry's first line, and where its numbers are in it. */
	REGION_LINE = 75,
	REGION_LENGTH = 21,
	REGION_BODY = 33,
	REGION_SUM = 58,
	/* A file's disk usage is a multiple of this, or of the tag's. */
	CACHE_DISK_BLOCK = 4096,
	/* The most bytes a name takes in a directory. */
	CACHE_NAME = 128,
	/* A temporary file not written for this long is abandoned. */
	TEMPORARY_S = 3600,
	/* The least time between sweeps for lack of room. */
	SWEEP_GAP_MS = 10000,
	/* Left free on the disk, unless 5 percent is less. */
	CACHE_FLOOR = 64 << 20,
	/* Size of the table of entries used lately: see entry_touch(). */
	CACHE_TOUCHED = 1024,
	/* The least time between two changes of the time of an entry's file. */
	CACHE_TOUCH_S = 600
};

/* An entry's region, the text at its start, parsed into slices. */
struct entry {
	size_t region;                /* its length in bytes */
	uint64_t body;                /* length of the body after it */
	struct text key;              /* the URL */
	struct text variant;          /* the request's values for Vary */
	struct text vary, token;      /* in markers: see marker_token() */
	struct text head;             /* of the response */
	int64_t requested, responded; /* wall clock, seconds */
	int64_t age;                  /* on arrival, in seconds */
	struct text server;           /* address that it came from, or - */
	bool counted;                 /* its head did not give a length */
};

/* An entry found for a request, possibly one still being stored. */
struct lookup {
	int fd;                 /* its file, or -1 */
	struct buffer *b;       /* bytes from its start */
	struct entry e;         /* slices of b */
	struct response r;      /* the response: slices of b */
	struct control control; /* its Cache-Control, see lookup_age() */
	enum reuse reuse;       /* how it may be used */
	const char *forward;    /* why the server is asked (RFC 9211) */
	char path[CACHE_PATH];  /* its path, or the last one tried */
};

/* A file that is being written: it gets its place when it is complete. */
struct temporary {
	int fd;                /* -1: there is no file */
	char path[CACHE_PATH]; /* empty once it has its place */
};

/* Why storing failed for lack of room, which makes the sweeper run. */
enum lack {
	LACK_NONE, /* there was room */
	LACK_SIZE, /* -s allows no more */
	LACK_DISK  /* the disk is full */
};

/*
 * How full the directory is.  Bytes are in whole blocks, as du(1) counts them.
 * The exact usage is never known, since a sweep takes time; but it is never
 * assumed too low.  All workers share this without a lock.  So each counts in
 * members of its own, and only the one that sweeps sets base, swept and limit;
 * of the last two members a lost change does no harm.  Two workers that take
 * room in the same moment may both get the last of it: for this, too, there is
 * the sixteenth of -s that is never used.
 */
static struct stock {
	uint64_t grown[WORKERS_MAX + 1];  /* bytes that each has added so far */
	uint64_t making[WORKERS_MAX + 1]; /* of entries that each stores now */
	uint64_t base;  /* of the directory, without all that has grown */
	uint64_t swept; /* what had grown when the last sweep began */
	uint64_t limit; /* the most that all of it may be together */
	enum lack lack; /* since the last sweep began */
	bool said_disk; /* warned: the disk is the limit */
} stock_alone = { .limit = UINT64_MAX };

static struct stock *stock = &stock_alone;

/* The state of the directory. */
static struct {
	uint64_t serial;  /* for temporary files and tokens */
	uint64_t block;   /* file sizes are rounded up to this */
	pid_t sweeper;    /* the child that sweeps, or 0 */
	int report;       /* the pipe from it */
	int64_t late_ms;  /* it hangs if it has not ended by then */
	int64_t lack_ms;  /* no sweep, or call for one, before this */
	unsigned worker;  /* that takes care, see store_sweep() */
	bool said_owner;  /* warned: a directory is another user's */
	bool said_unread; /* warned: a sweep failed */
	bool said_failed; /* warned: a file can't be written */
} store = { .block = CACHE_DISK_BLOCK, .report = -1 };

/* Buffers for data needed within one call: each has one purpose. */
enum work {
	WORK_KEY,     /* see key_of() */
	WORK_LIST,    /* the fields that a response varies by */
	WORK_VARIANT, /* a request's values for them, or a path */
	WORK_HEAD,    /* a head to be stored, or a marker */
	WORK_REGION,  /* the region of an entry */
	WORKS         /* how many there are */
};

static struct buffer works[WORKS];

/* Returns the buffer for work, emptied. */
static struct buffer *
work_buffer(enum work work)
{
	return buffer_clear(&works[work]);
}

/* ---- names of entries ---- */

/* The path of a file in the directory into `to`, which has CACHE_PATH bytes. */
static void
store_path(const char *name, char *to)
{
	(void)snprintf(to, CACHE_PATH, "%.800s/%.200s", options.cache, name);
}

/* Removes a file in the directory. */
static void
store_remove(const char *name)
{
	char path[CACHE_PATH];

	store_path(name, path);
	(void)unlink(path);
}

/* Appends t in lower case. */
static void
lower_append(struct buffer *b, struct text t)
{
	size_t start = b->end;

	buffer_append(b, t);
	(void)text_lower(text_cut(b->data + start, b->end - start),
	    b->data + start);
}

/* The key of a target, its normalized URL, valid until the next call. */
static struct text
key_of(const struct target *t)
{
	struct buffer *b = work_buffer(WORK_KEY);

	buffer_word(b, "http://");
	lower_append(b, t->host);
	buffer_word(b, ":");
	buffer_number(b, t->port);
	if (t->path.len == 0 || *t->path.at != '/')
		buffer_word(b, "/");
	buffer_append(b, t->path);
	return buffer_text(b);
}

/* A 64-bit hash of a key. */
static uint64_t
key_hash(struct text key)
{
	return hash_text(14695981039346656037U, key);
}

/* The path for a key or a variant of it, into `to`: CACHE_PATH bytes. */
static void
entry_path(struct text key, struct text variant, char *to)
{
	uint64_t first = key_hash(key);
	uint64_t second = hash_text(first * 31 + 7, key);

	first = hash_text(first, variant);
	second = hash_text(second, variant);
	(void)text_copy(text_of(options.cache), to, 901);
	to += strlen(to);
	*to++ = '/';
	to = hex_print(to, first >> 56, 2);
	*to++ = '/';
	to = hex_print(to, first, 14);
	to = hex_print(to, second, 16);
	*to = '\0';
}

/* Appends one value of a field, for variant_append(). */
static void
value_append(struct buffer *b, struct text name, struct text value, bool *first)
{
	static const char caseless[][LISTED_NAME] = { "Accept-Charset",
		"Accept-Encoding", "Accept-Language", "" };
	static const char single[][LISTED_NAME] = { "Cookie", "Origin",
		"Referer", "User-Agent", "" };
	bool list = !name_is_among(name, single);
	struct text member = value;

	buffer_word(b, *first ? "=" : "");
	*first = false;
	while (!list || list_next(&value, &member)) {
		buffer_number(b, member.len);
		buffer_word(b, ":");
		if (name_is_among(name, caseless))
			lower_append(b, member);
		else
			buffer_append(b, member);
		buffer_word(b, ",");
		if (!list)
			break;
	}
}

/*
 * A response that sets a cookie and is not explicitly shared is stored for its
 * client only.  This word, which is no valid field name, stands for the client
 * in its Vary.
 */
static const char vary_client[] = ":client";

/* True if a response is stored for one client only. */
static bool
response_is_personal(const struct response *r)
{
	struct control control;

	if (!head_has(&r->head, "Set-Cookie"))
		return false;
	control = control_parse(&r->head);
	return !control.is_public && control.s_maxage < 0;
}

/* Appends the value for vary_client: the client's address and user name. */
static void
client_append(const struct request *q, struct buffer *b)
{
	const struct exchange *x = q->owner;

	buffer_word(b, "=");
	buffer_word(b, x != NULL ? address_host(&x->peer) : "-");
	if (x != NULL && x->record.user != NULL) {
		buffer_word(b, " ");
		buffer_escape(b, x->record.user->user, CREDENTIAL_MAX, false);
	}
}

/*
 * Appends to b the values that a request, as it is sent, has for the fields of
 * a Vary list: `name=` and the values, each after its length.  Lines are joined
 * and blanks around commas dropped, but for fields that are no lists; letters
 * are put in lower case where case means nothing (RFC 9111 section 4.1).
 */
static void
variant_append(const struct request *q, struct text vary, struct buffer *b)
{
	const struct rewrites *w = &q->rewrites;
	const struct head *h = &q->head;
	struct text name;
	size_t i;

	while (list_next(&vary, &name)) {
		bool first = true;

		lower_append(b, name);
		if (text_is(name, vary_client))
			client_append(q, b);
		/* TE does not pass, but the server gets one like it. */
		for (i = 0; i < h->n; i++)
			if (!mark_is_set(&w->taken, i) &&
			    (text_is(name, "TE") || field_passes(h, i)) &&
			    text_same(field_name(h, i), name))
				value_append(b, name, field_value(h, i),
				    &first);
		for (i = 0; i < w->n; i++)
			if (text_same(w->fields[i]->name, name))
				value_append(b, name, w->fields[i]->value,
				    &first);
		buffer_word(b, ";");
	}
}

/* Compares two texts for qsort(3), ignoring case. */
static int
name_compare(const void *one, const void *two)
{
	const struct text *a = one, *b = two;
	int order =
	    strncasecmp(a->at, b->at, a->len < b->len ? a->len : b->len);

	return order != 0 ? order : (a->len > b->len) - (a->len < b->len);
}

/*
 * Appends all that a response varies by to b, as one sorted list: its Vary, the
 * range of a part of a body, and vary_client.  False if it is too long, or has
 * what is no name: that might mean any field.
 */
static bool
vary_append(const struct response *r, struct buffer *b)
{
	struct text list[VARY_MAX + 2], *last = list, *t, member;
	struct members m = { 0, { "", 0 } };

	while (member_next(&r->head, "Vary", &m, &member)) {
		if (last == list + VARY_MAX || !text_is_token(member))
			return false;
		*last++ = member;
	}
	if (r->status == 206)
		*last++ = text_of("range");
	if (response_is_personal(r))
		*last++ = text_of(vary_client);
	qsort(list, (size_t)(last - list), sizeof(*list), name_compare);
	for (t = list; t < last; t++) {
		if (t > list && text_same(t[0], t[-1]))
			continue;
		buffer_word(b, t > list ? "," : "");
		lower_append(b, *t);
	}
	return !b->overflow;
}

/*
 * Appends to b q's values for all that r varies by: the variant that q selects.
 * False if it is too long.
 */
static bool
variant_of(const struct request *q, const struct response *r, struct buffer *b)
{
	struct buffer *list = work_buffer(WORK_LIST);

	if (!vary_append(r, list))
		return false;
	variant_append(q, buffer_text(list), b);
	return !b->overflow;
}

/*
 * True if q selects the variant e, whose head is r: q has the values for which
 * it was stored.
 */
static bool
variant_fits(const struct entry *e, const struct response *r,
    const struct request *q)
{
	struct buffer *b = work_buffer(WORK_VARIANT);

	return variant_of(q, r, b) && text_equals(buffer_text(b), e->variant);
}

/* ---- entries ---- */

/*
 * An entry begins with a region of text, a multiple of CACHE_BLOCK long:
 *
 *   proxy-cache 1 region 004096 body 00000000000000001256 sum 0123456789abcdef
 *   key: http://example.com:80/
 *   variant: accept-encoding=gzip;
 *   requested: 1795300860
 *   responded: 1795300860
 *   age: 0
 *   server: 93.184.216.34:80
 *   pad: ...
 *
 *   HTTP/1.1 200 OK
 *   ...
 *
 * and the body follows.  The sum covers the region and the numbers in its first
 * line.  `counted: yes` says that the length was not known when the head came.
 * A marker, which leads to variants, has `key:`, `vary:` and `token:`, and no
 * head.  The token is part of the variants' names: variants with an older token
 * are never found again.
 */

/* Adds a word to a sum: FNV-1a, but no change at the top may be lost. */
static uint64_t
sum_word(uint64_t sum, uint64_t word)
{
	sum = (sum ^ word) * 1099511628211U;
	return sum ^ sum >> 32;
}

/* The sum of a region without its first line. */
static uint64_t
region_sum(struct text rest)
{
	uint64_t sum = 14695981039346656037U;

	for (; rest.len >= 8; rest = text_from(rest, 8))
		sum = sum_word(sum, word_read(rest.at));
	return sum_word(sum, word_last(rest));
}

/* Writes n in decimal over the last of `width` zeros. */
static void
digits_print(char *to, uint64_t n, size_t width)
{
	for (; n > 0 && width > 0; n /= 10)
		to[--width] = (char)('0' + n % 10);
}

/*
 * Writes a region's first line to `to`, which has REGION_LINE bytes, without a
 * NUL.
 */
static void
region_line(char *to, struct text rest, uint64_t body)
{
	size_t region = REGION_LINE + rest.len;
	uint64_t sum = sum_word(sum_word(region_sum(rest), region), body);

	memcpy(to,
	    "proxy-cache 1 region 000000 body 00000000000000000000 "
	    "sum 0000000000000000\n",
	    REGION_LINE);
	digits_print(to + REGION_LENGTH, region, 6);
	digits_print(to + REGION_BODY, body, 20);
	(void)hex_print(to + REGION_SUM, sum, 16);
}

/* Takes a line `name: value` from *rest; false if that is not next. */
static bool
region_field(struct text *rest, const char *name, struct text *value)
{
	size_t n = strlen(name), end = text_find(*rest, '\n');

	if (end == rest->len || end < n + 2 || memcmp(rest->at, name, n) != 0 ||
	    memcmp(rest->at + n, ": ", 2) != 0)
		return false;
	*value = text_cut(rest->at + n + 2, end - n - 2);
	*rest = text_from(*rest, end + 1);
	return true;
}

/* Takes such a line with a number. */
static bool
region_number(struct text *rest, const char *name, int64_t *value)
{
	uint64_t number;
	struct text t;

	if (!region_field(rest, name, &t) ||
	    !number_parse(t, (uint64_t)1 << 40, &number))
		return false;
	*value = (int64_t)number;
	return true;
}

/* Parses a region without its first line; false if it is damaged. */
static bool
region_parse(struct text rest, struct entry *e)
{
	struct text pad;

	if (!region_field(&rest, "key", &e->key))
		return false;
	if (region_field(&rest, "vary", &e->vary))
		return region_field(&rest, "token", &e->token);
	if (!region_field(&rest, "variant", &e->variant) ||
	    !region_number(&rest, "requested", &e->requested) ||
	    !region_number(&rest, "responded", &e->responded) ||
	    !region_number(&rest, "age", &e->age) ||
	    !region_field(&rest, "server", &e->server))
		return false;
	e->counted = region_field(&rest, "counted", &pad);
	if (!region_field(&rest, "pad", &pad) || rest.len < 1 ||
	    *rest.at != '\n')
		return false;
	e->head = text_from(rest, 1);
	return true;
}

/* Parses the region at the start of t; false if it is damaged. */
static bool
entry_parse(struct text t, struct entry *e)
{
	uint64_t region;
	char line[REGION_LINE];
	struct text rest;

	memset(e, 0, sizeof(*e));
	if (t.len < REGION_LINE ||
	    !number_parse(text_cut(t.at + REGION_LENGTH, 6), 999999, &region) ||
	    !number_parse(text_cut(t.at + REGION_BODY, 20), INT64_MAX,
		&e->body) ||
	    region > t.len || region < REGION_LINE)
		return false;
	e->region = (size_t)region;
	rest = text_cut(t.at + REGION_LINE, e->region - REGION_LINE);
	region_line(line, rest, e->body);
	return memcmp(line, t.at, REGION_LINE) == 0 && region_parse(rest, e);
}

/*
 * Parses the head of the entry in l as its response, which is as long as the
 * entry, if the server said so; false if it is none.
 */
static bool
entry_response(struct lookup *l)
{
	if (response_parse(l->e.head, METHOD_GET, &l->r) != 1)
		return false;
	if (!l->e.counted) {
		l->r.framing = FRAMING_LENGTH;
		l->r.length = l->e.body;
	}
	return true;
}

/*
 * Reads the file l->fd from its beginning into l->b and parses it: an entry
 * with a response, or a marker.  If region is not 0, it is the region's length,
 * and the body is still to come.  Else the file must be as long as its first
 * line says; for a small file the read shows that.  False if it is neither.
 */
static bool
entry_read(struct lookup *l, size_t region)
{
	struct buffer *b = buffer_clear(l->b);
	size_t wanted = region ? region : buffer_room(b);
	ssize_t n = fd_read(l->fd, b->data + b->start, wanted);
	struct stat status;
	uint64_t whole;

	b->end += n > 0 ? (size_t)n : 0;
	if (!entry_parse(buffer_text(b), &l->e) ||
	    (l->e.vary.at == NULL && !entry_response(l)))
		return false;
	whole = l->e.region + l->e.body;
	if (region > 0 || (uint64_t)n == whole)
		return true;
	return (uint64_t)n < whole && fstat(l->fd, &status) != -1 &&
	    (uint64_t)status.st_size == whole;
}

/*
 * Opens the entry at path and reads its beginning into l->b, see entry_read().
 * l->fd becomes the descriptor, which the caller owns, or -1 if there is no
 * valid entry for the key.
 */
static void
entry_open(struct lookup *l, const char *path, size_t region, struct text key)
{
	l->fd = open(path, O_RDWR | O_NONBLOCK);
	if (l->fd == -1 && (errno == EACCES || errno == EROFS))
		l->fd = open(path, O_RDONLY | O_NONBLOCK);
	if (fd_note(l->fd) != -1 &&
	    (!entry_read(l, region) || !text_equals(l->e.key, key)))
		fd_drop(&l->fd);
}

/* Entries used lately, the file's time of which is recent. */
static struct {
	uint64_t name; /* hash of key and variant */
	time_t when;   /* the file's time was set or checked */
} store_touched[CACHE_TOUCHED];

/*
 * Records the use of an entry in its file's time, for the sweeper, if that is
 * older than CACHE_TOUCH_S, or from the future: as unsigned that is older, too.
 * The table avoids most calls.
 */
static void
entry_touch(int fd, const struct entry *e)
{
	uint64_t name = hash_text(key_hash(e->key), e->variant);
	size_t i = (size_t)(name % CACHE_TOUCHED);
	struct stat status;

	if (store_touched[i].name == name &&
	    (uint64_t)(now.wall - store_touched[i].when) < CACHE_TOUCH_S)
		return;
	store_touched[i].name = name;
	store_touched[i].when = now.wall;
	if (fstat(fd, &status) != -1 &&
	    (uint64_t)(now.wall - status.st_mtime) >= CACHE_TOUCH_S)
		(void)futimens(fd, NULL);
}

/*
 * Finds the entry with this key for a request.  l->b is the entry's beginning
 * and l->fd its descriptor, or -1 if there is none; l->path is the last path
 * tried.
 */
static void
entry_find(const struct request *q, struct text key, struct lookup *l)
{
	struct buffer *name = work_buffer(WORK_VARIANT);
	size_t token;

	entry_path(key, text_of(""), l->path);
	entry_open(l, l->path, 0, key);
	/* A variant that somebody moved here must not answer all requests. */
	if (l->fd != -1 && l->e.variant.len > 0)
		fd_drop(&l->fd);
	if (l->fd == -1 || l->e.vary.at == NULL)
		return;
	/* A marker is used with its variants: they are lost without it. */
	entry_touch(l->fd, &l->e);
	fd_drop(&l->fd);
	buffer_append(name, l->e.token);
	buffer_word(name, ";");
	token = buffer_len(name);
	variant_append(q, l->e.vary, name);
	entry_path(key, buffer_text(name), l->path);
	if (!name->overflow)
		entry_open(l, l->path, 0, key);
	if (l->fd == -1)
		l->forward = "vary-miss";
	else if (!text_equals(l->e.variant,
		     text_from(buffer_text(name), token)))
		fd_drop(&l->fd);
}

/* Bytes of the disk that a file of n bytes takes. */
static uint64_t
disk_bytes(uint64_t n)
{
	return (n + store.block - 1) / store.block * store.block;
}

/* The sum of what all workers have counted. */
static uint64_t
stock_sum(const uint64_t *counts)
{
	uint64_t sum = 0;
	size_t i;

	for (i = 0; i < workers_n; i++)
		sum += counts[i];
	return sum;
}

/* What the cache takes of the disk in bytes, at most. */
static uint64_t
store_bytes(void)
{
	return stock->base + stock_sum(stock->grown) + stock_sum(stock->making);
}

/*
 * True if n more bytes of the disk may be taken: -s is never exceeded, however
 * slow the sweeper is.
 */
static bool
store_fits(uint64_t n)
{
	if (store_bytes() + n <= stock->limit)
		return true;
	if (stock->lack == LACK_NONE)
		stock->lack = LACK_SIZE;
	return false;
}

/* Notes that the disk is full, so that a sweep makes room. */
static void
store_lacks_disk(const char *why)
{
	stock->lack = LACK_DISK;
	if (!stock->said_disk)
		warn("the disk, not -s, limits the cache %s: %s", options.cache,
		    why);
	stock->said_disk = true;
}

/* After a failed call, notes from errno that the disk is full, or says why. */
static void
disk_failed(void)
{
	if (errno == ENOSPC || errno == EDQUOT)
		store_lacks_disk(strerror(errno));
	else if (!store.said_failed) {
		warn("can't write the cache %s: %s", options.cache,
		    strerror(errno));
		store.said_failed = true;
	}
}

static const char store_tag[] = "Signature: 8a477f597d28d172789f06886806bc55\n"
				"# A cache of proxy; all of it may go.\n";

/* Makes the file that marks the directory as a cache; -1 if there is one. */
static int
tag_make(void)
{
	char path[CACHE_PATH];
	int fd;

	store_path("CACHEDIR.TAG", path);
	fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
	if (fd != -1)
		(void)fd_write(fd, store_tag, strlen(store_tag));
	return fd;
}

/*
 * Makes the directory of the file at path, if it is missing; and the tag, as
 * somebody may have removed all that was in the cache.
 */
static void
entry_directory(const char *path)
{
	char directory[CACHE_PATH];
	int tag;

	(void)text_copy(text_of(path), directory, sizeof(directory));
	*strrchr(directory, '/') = '\0';
	if (mkdir(directory, 0700) == -1) {
		if (errno != EEXIST)
			disk_failed();
		return;
	}
	tag = tag_make();
	stock->grown[worker] += store.block * (tag != -1 ? 2 : 1);
	fd_drop(&tag);
}

/* Writes all of t to fd at offset; false if that fails. */
static bool
write_at(int fd, struct text t, off_t offset)
{
	while (t.len > 0) {
		ssize_t n = fd_write_at(fd, t.at, t.len, offset);

		if (n <= 0) {
			disk_failed();
			return false;
		}
		t = text_from(t, (size_t)n);
		offset += n;
	}
	return true;
}

/* Writes the first line of a built region; body is the body's length. */
static void
region_seal(struct buffer *b, uint64_t body)
{
	region_line(b->data + b->start, text_from(buffer_text(b), REGION_LINE),
	    body);
}

/*
 * Builds the region of e in b, with head.  It is `region` bytes long, or if
 * that is 0, as many blocks as it needs, with some spare for later.  False if
 * it does not fit.
 */
static bool
region_build(struct buffer *b, const struct entry *e, struct text head,
    size_t region)
{
	size_t used, room = buffer_room(b);

	b->end += REGION_LINE;
	buffer_word(b, "key: ");
	buffer_append(b, e->key);
	buffer_word(b, "\nvariant: ");
	buffer_append(b, e->variant);
	buffer_print(b,
	    "\nrequested: %lld\nresponded: %lld\nage: %lld\nserver: ",
	    (long long)e->requested, (long long)e->responded,
	    (long long)e->age);
	buffer_append(b, e->server);
	buffer_word(b, e->counted ? "\ncounted: yes\npad: " : "\npad: ");
	used = buffer_len(b) + 2 + head.len;
	if (region == 0)
		region = (used + CACHE_SPARE + CACHE_BLOCK - 1) / CACHE_BLOCK *
		    CACHE_BLOCK;
	if (b->overflow || region > room || used > region)
		return false;
	memset(b->data + b->end, '.', region - used);
	b->end += region - used;
	buffer_word(b, "\n\n");
	buffer_append(b, head);
	region_seal(b, e->body);
	return true;
}

/* Makes a temporary file; false if that fails. */
static bool
temporary_open(struct temporary *t)
{
	(void)snprintf(t->path, CACHE_PATH, "%.900s/tmp.%ld.%llu",
	    options.cache, (long)getpid(), (unsigned long long)++store.serial);
	t->fd = fd_note(open(t->path, O_RDWR | O_CREAT | O_EXCL, 0600));
	if (t->fd == -1)
		disk_failed();
	return t->fd != -1;
}

/*
 * Renames a temporary file, n bytes long and still open, to path; false if that
 * fails.  The sweeper may remove an empty directory at any time.
 */
static bool
temporary_place(struct temporary *t, uint64_t n, const char *path)
{
	struct stat status;
	uint64_t bytes = disk_bytes(n);
	bool good = rename(t->path, path) != -1;

	if (!good && errno == ENOENT) {
		entry_directory(path);
		good = rename(t->path, path) != -1;
	}
	/* Anybody may have removed the file. */
	if (!good && errno != ENOENT)
		disk_failed();
	if (!good)
		return false;
	t->path[0] = '\0';
	if (fstat(t->fd, &status) != -1 &&
	    (uint64_t)status.st_blocks * 512 > bytes)
		bytes = (uint64_t)status.st_blocks * 512;
	stock->grown[worker] += bytes + CACHE_NAME;
	return true;
}

/* Closes a temporary file, and removes it if it has no place. */
static void
temporary_close(struct temporary *t)
{
	if (t->fd != -1 && t->path[0] != '\0')
		(void)unlink(t->path);
	fd_drop(&t->fd);
}

/* Writes b as the file at path, completely or not at all: false if not. */
static bool
file_put(const char *path, const struct buffer *b)
{
	struct temporary t = { .fd = -1 };
	bool good;

	if (!store_fits(disk_bytes(buffer_len(b)) + store.block) ||
	    !temporary_open(&t))
		return false;
	good = write_at(t.fd, buffer_text(b), 0) &&
	    temporary_place(&t, buffer_len(b), path);
	temporary_close(&t);
	return good;
}

/*
 * Appends the token for the variants of a key by this Vary list to `token`.
 * The marker at the key's own path contains it; if there is none with this
 * list, writes one with a new token.  False if that fails, or if it is for a
 * part of a body, and other entries would be lost.
 */
static bool
marker_token(struct text key, struct text vary, bool part, struct buffer *token)
{
	struct buffer *b = work_buffer(WORK_HEAD);
	struct lookup l;
	bool there;

	l.b = b;
	entry_path(key, text_of(""), l.path);
	entry_open(&l, l.path, 0, key);
	there = l.fd != -1;
	fd_drop(&l.fd);
	if (there && text_equals(l.e.vary, vary)) {
		buffer_append(token, l.e.token);
		return true;
	}
	if (there && part)
		return false;
	buffer_print(token, "%llx.%lx.%llx", (unsigned long long)now.wall,
	    (long)getpid(), (unsigned long long)++store.serial);
	buffer_clear(b)->end += REGION_LINE;
	buffer_word(b, "key: ");
	buffer_append(b, key);
	buffer_word(b, "\nvary: ");
	buffer_append(b, vary);
	buffer_word(b, "\ntoken: ");
	buffer_append(b, buffer_text(token));
	buffer_word(b, "\n");
	region_seal(b, 0);
	return !b->overflow && file_put(l.path, b);
}

/* True if a validation leaves that field of the stored head unchanged. */
static bool
field_is_kept(const struct head *news, struct text name)
{
	size_t i;

	for (i = 0; i < news->n; i++)
		if (text_same(name, field_name(news, i)))
			return name_is_among(name, fields_of_body);
	return !text_is(name, "Date");
}

/*
 * Appends the head to be stored for r, without framing and hop-by-hop fields.
 * If r validates an entry, old is the stored response, and r's fields replace
 * those of its head (RFC 9111 section 3.2); its cookies only with `cookies`.  A
 * missing Date is set to now, so that age and lifetime count from now (RFC 9110
 * section 6.6.1).
 */
static void
stored_head_append(const struct response *r, const struct response *old,
    bool cookies, struct buffer *b)
{
	const struct head *h = &r->head;
	size_t i;

	status_append(b, r->minor, old ? old->status : r->status,
	    old ? old->reason : r->reason);
	for (i = 0; old != NULL && i < old->head.n; i++)
		if (field_is_kept(h, field_name(&old->head, i)))
			field_append(b, &old->head, i);
	for (i = 0; i < h->n; i++)
		if (field_passes(h, i) &&
		    (old == NULL ||
			(!name_is_among(field_name(h, i), fields_of_body) &&
			    (cookies ||
				!text_is(field_name(h, i), "Set-Cookie")))))
			field_append(b, h, i);
	if (!head_has(h, "Date"))
		buffer_print(b, "Date: %s\r\n", date_now(DATE_HTTP));
	buffer_word(b, "\r\n");
}

/* ---- 15. Store: the sweeper ---- */

/*
 * Keeps the directory as small as -s says: a child process removes what was
 * not used for longest, each time the room has run out.  Opens the directory,
 * too, and makes sure that it is one.
 *
 * Door: store_open, store_print, store_sweep.
 */

/* A file in the cache directory. */
struct file {
	const char *path; /* with the cache directory */
	const char *name; /* without it */
	bool entry;       /* probably one, by its place */
	bool bucket;      /* a directory of entries */
	uid_t owner;      /* whose it is */
	uint64_t bytes;   /* of the disk */
	int64_t age;      /* seconds since it was written or touched */
};

/* Fills in f for the file at path; false if it has vanished. */
static bool
file_look(struct file *f, const char *path)
{
	struct stat status;
	const char *slash;

	f->path = path;
	f->name = path + strlen(options.cache) + 1;
	if (lstat(path, &status) == -1)
		return false;
	slash = strchr(f->name, '/');
	f->entry = slash != NULL && slash[1] != '.' && S_ISREG(status.st_mode);
	f->bucket = strlen(f->name) == 2 && S_ISDIR(status.st_mode);
	f->owner = status.st_uid;
	f->bytes = (uint64_t)status.st_blocks * 512;
	f->age = now.wall - status.st_mtime;
	return true;
}

/*
 * Calls visit for each file in a directory.  Returns 0, or errno if the
 * directory can't be read to its end.
 */
static int
directory_walk(const char *at,
    void (*visit)(const struct file *file, void *argument), void *argument)
{
	char path[CACHE_PATH + 64];
	/* A link in it would lead out of the cache: it is not followed. */
	int links = strcmp(at, options.cache) == 0 ? 0 : O_NOFOLLOW;
	int fd = open(at, O_RDONLY | O_DIRECTORY | links);
	DIR *directory = fd != -1 ? fdopendir(fd) : NULL;
	const struct dirent *name;
	struct file file;
	int error;

	if (directory == NULL) {
		error = errno;
		fd_drop(&fd);
		return error;
	}
	for (errno = 0; (name = readdir(directory)) != NULL; errno = 0) {
		(void)snprintf(path, sizeof(path), "%.803s/%.255s", at,
		    name->d_name);
		if (strcmp(name->d_name, ".") != 0 &&
		    strcmp(name->d_name, "..") != 0 && file_look(&file, path))
			visit(&file, argument);
	}
	error = errno;
	(void)closedir(directory);
	return error;
}

/*
 * The same for the whole cache: the directories of entries, some of which may
 * be missing, then the one above them.
 */
static int
store_walk(void (*visit)(const struct file *file, void *argument),
    void *argument)
{
	char path[CACHE_PATH];
	int error = 0, last;
	unsigned i;

	for (i = 0; i <= 256; i++) {
		(void)snprintf(path, sizeof(path),
		    i < 256 ? "%.800s/%02x" : "%.800s", options.cache, i);
		last = directory_walk(path, visit, argument);
		if (last != 0 &&
		    (i == 256 ||
			(last != ENOENT && last != ENOTDIR && last != ELOOP)))
			error = last;
	}
	return error;
}

/* The process that made a temporary file; 0 if the name is not temporary. */
static pid_t
temporary_owner(const char *name)
{
	uint64_t pid;

	if (strncmp(name, "tmp.", 4) != 0 ||
	    !number_parse(text_until(text_of(name + 4), "."), INT32_MAX, &pid))
		return 0;
	return (pid_t)pid;
}

/* The sweeper's account: the bytes of entries by age. */
struct sweep {
	uint64_t bytes;    /* of all files */
	uint64_t ages[64]; /* of entries, by sweep_age() */
	uint64_t most;     /* that may stay */
	uint64_t kept;     /* that will stay */
	uint64_t evicted;  /* entries that were removed */
	unsigned cut;      /* older ones go, this age as needed */
};

/*
 * A file's age on a logarithmic scale.  One from the future was written when
 * the clock was wrong; it would seem new until then, so it is the oldest.
 */
static unsigned
sweep_age(const struct file *f)
{
	int64_t age = f->age < -CLOCK_STEP_S ? INT64_MAX : f->age;
	unsigned n = 0;

	for (; age > 0 && n < 60; age -= age / 2 + 1)
		n++;
	return n;
}

/* True if a process of this proxy stores there, and counts it itself. */
static bool
temporary_is_ours(pid_t owner)
{
	size_t i = 0;

	while (i < workers_n && workers[i].pid != owner)
		i++;
	return owner != 0 && i < workers_n;
}

/* The first pass: counts a file, or removes an abandoned one. */
static void
sweep_count(const struct file *f, void *argument)
{
	struct sweep *sweep = argument;
	pid_t owner = temporary_owner(f->name);
	bool ours = temporary_is_ours(owner);

	if (!ours && owner != 0 && f->age >= TEMPORARY_S)
		(void)unlink(f->path);
	else if (!ours)
		sweep->bytes += f->bytes;
	if (f->entry)
		sweep->ages[sweep_age(f)] += f->bytes;
}

/* The second pass: removes a file, if it must go. */
static void
sweep_remove(const struct file *f, void *argument)
{
	struct sweep *sweep = argument;
	unsigned age = sweep_age(f);
	bool last = f->entry && age == sweep->cut;
	bool due = last ? sweep->kept > sweep->most :
			  f->entry && age > sweep->cut;

	if (f->bucket ? rmdir(f->path) == -1 : !due || unlink(f->path) == -1)
		return;
	sweep->evicted += f->entry;
	/* The first pass may have missed it. */
	sweep->bytes -= f->bytes < sweep->bytes ? f->bytes : sweep->bytes;
	if (last)
		sweep->kept -= f->bytes < sweep->kept ? f->bytes : sweep->kept;
}

/*
 * Decides how much may stay, and so how old it may be: five eighths of the
 * cache's size, or of the present bytes if the disk is full and that is less.
 * True if something must go.
 */
static bool
sweep_plan(struct sweep *sweep, bool disk)
{
	unsigned age;

	sweep->most = options.cache_size / 8 * 5;
	if (disk && sweep->bytes / 8 * 5 < sweep->most)
		sweep->most = sweep->bytes / 8 * 5;
	sweep->kept = sweep->bytes;
	for (age = 0; age < 64; age++)
		sweep->kept -= sweep->ages[age];
	while (sweep->cut < 63 &&
	    (sweep->kept += sweep->ages[sweep->cut]) <= sweep->most)
		sweep->cut++;
	return sweep->bytes > sweep->most;
}

/*
 * Takes over the sweeper's count.  It may lack bytes that were written since it
 * began.
 */
static void
sweep_result(uint64_t bytes)
{
	stock->base = bytes - stock->swept;
	if (stock->lack == LACK_SIZE)
		stock->lack = LACK_NONE;
	if (stock->limit == options.cache_size / 16 * 15)
		return;
	stock->limit = options.cache_size / 16 * 15;
	store_remove("unswept");
}

/*
 * If the sweeper has ended, reads its report; one that was killed has none.
 * One that hangs, as a network's file system may let it, is killed: else no
 * other would make room.
 */
static void
sweep_reap(void)
{
	uint64_t report[3];
	ssize_t n;

	if (waitpid(store.sweeper, NULL, WNOHANG) == 0) {
		if (now.ms < store.late_ms)
			return;
		warn("the sweeper of the cache %s hangs: it is killed",
		    options.cache);
		(void)kill(store.sweeper, SIGKILL);
		store.late_ms = INT64_MAX;
		return;
	}
	store.sweeper = 0;
	n = fd_read(store.report, report, sizeof(report));
	fd_drop(&store.report);
	if (n != (ssize_t)sizeof(report))
		return;
	if (report[0] == 0) {
		sweep_result(report[1]);
		totals.evicted += report[2];
	} else if (!store.said_unread)
		warn("can't read the cache %s: %s", options.cache,
		    strerror((int)report[0]));
	store.said_unread = report[0] != 0;
}

/*
 * The sweeper: a child that removes the least recently used entries.  One pass
 * counts, one removes, so that memory use does not depend on their number.  It
 * reports an errno or 0, how many bytes are left, and how many entries were
 * removed.  It closes the standard descriptors, too: who reads them until their
 * end waits for the proxy only.
 */
static void
sweeper_main(int fd, bool disk)
{
	static const int caught[] = { SIGHUP, SIGUSR1, SIGTERM, SIGINT };
	struct sweep sweep = { .bytes = 0 };
	struct stat status;
	uint64_t report[3];
	size_t i;

	for (i = 0; i < sizeof(caught) / sizeof(caught[0]); i++)
		(void)signal(caught[i], SIG_DFL);
	fds_close(fd, fd);
	for (i = STDIN_FILENO; i <= STDERR_FILENO; i++)
		(void)close((int)i);
	if (stat(options.cache, &status) != -1)
		sweep.bytes += (uint64_t)status.st_blocks * 512;
	report[0] = (uint64_t)store_walk(sweep_count, &sweep);
	if (sweep_plan(&sweep, disk))
		(void)store_walk(sweep_remove, &sweep);
	report[1] = sweep.bytes;
	report[2] = sweep.evicted;
	(void)fd_write(fd, report, sizeof(report));
	_exit(0);
}

/* Starts the sweeper. */
static void
sweep_start(void)
{
	bool disk = stock->lack == LACK_DISK;
	int fds[2] = { -1, -1 };

	if (stock->lack != LACK_NONE)
		store.lack_ms = now.ms + SWEEP_GAP_MS;
	stock->swept = stock_sum(stock->grown);
	stock->lack = LACK_NONE;
	store.late_ms = now.ms + SWEEP_MS;
	store.sweeper = pipe_open(fds) ? fork() : -1;
	if (store.sweeper == 0)
		sweeper_main(fds[1], disk);
	fd_drop(&fds[1]);
	if (store.sweeper == -1) {
		/* It is tried again. */
		stock->lack = disk ? LACK_DISK : LACK_SIZE;
		store.lack_ms = now.ms + SWEEP_GAP_MS;
		fd_drop(&fds[0]);
	}
	store.report = fds[0];
}

/* ---- the directory ---- */

/*
 * Removes a temporary file of a crashed proxy or worker, not one of a running
 * one.  None is ours yet.
 */
static void
temporary_remove(const struct file *f, void *argument)
{
	pid_t owner = temporary_owner(f->name);

	(void)argument;
	if (owner > 0 &&
	    (owner == getpid() || (kill(owner, 0) == -1 && errno == ESRCH) ||
		f->age >= TEMPORARY_S))
		(void)unlink(f->path);
}

/*
 * Ends the program if a file is not of a cache; removes old temporary files.
 * Warns of the first directory that the user of -u can't write: it was made for
 * its owner alone.
 */
static void
store_check(const struct file *f, void *argument)
{
	const bool *tagged = argument;

	if (!*tagged ||
	    (strncmp(f->name, "tmp.", 4) != 0 &&
		strcmp(f->name, "unswept") != 0 &&
		strcmp(f->name, "CACHEDIR.TAG") != 0 &&
		(!f->bucket || hex_value(f->name[0]) < 0 ||
		    hex_value(f->name[1]) < 0)))
		die("%s is not a cache of proxy: it contains %s", options.cache,
		    f->name);
	temporary_remove(f, NULL);
	if (!f->bucket || options.user == NULL || options.uid == 0 ||
	    f->owner == options.uid || store.said_owner)
		return;
	warn("user %s can't write %s: chown -R %s %s", options.user, f->path,
	    options.user, options.cache);
	store.said_owner = true;
}

/*
 * Gives the file or directory at path, open as fd unless that is -1, to the
 * user of -u, if any, and closes fd.  A path alone might lead elsewhere once
 * that user moves it.
 */
static void
store_own(int fd, const char *path)
{
	if (fd != -1 && options.user != NULL &&
	    fchown(fd, options.uid, options.gid) == -1)
		die("can't give %s to user %s: %s", path, options.user,
		    strerror(errno));
	fd_drop(&fd);
}

/*
 * Assumes how full the cache is until the first sweep has counted it.  A run
 * never uses the last sixteenth, so half of that is left for entries stored
 * before then; but not if an earlier run ended before its first sweep did, as
 * the file `unswept` shows.
 */
static void
store_assume(const char *tag, bool fresh)
{
	char path[CACHE_PATH];
	struct stat status;
	int fd;

	/* Some file systems have larger blocks. */
	if (stat(tag, &status) != -1 &&
	    (uint64_t)status.st_blocks * 512 > store.block)
		store.block = (uint64_t)status.st_blocks * 512;
	/* Serials differ from an earlier process with our id. */
	store.serial = (uint64_t)now.wall << 20 | (uint64_t)(now.us & 0xfffff);
	/* What seems to be written makes the first turn start a sweep. */
	stock->swept = -options.cache_size;
	stock->base = 2 * store.block;
	stock->limit = options.cache_size / 16 * 15;
	if (fresh)
		return;
	store_path("unswept", path);
	fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
	if (fd == -1 && errno != EEXIST)
		disk_failed();
	stock->base = fd != -1 ? stock->limit : options.cache_size;
	stock->limit = options.cache_size / 32 * 31;
	if (fd != -1)
		(void)close(fd);
}

/*
 * Makes the cache directory, or checks that it is one: a directory with other
 * files must not be filled or swept.
 */
static void
store_open(void)
{
	char path[CACHE_PATH], text[sizeof(store_tag)] = { 0 };
	bool tagged;
	int fd, error;

	if (strlen(options.cache) > CACHE_PATH - 300)
		die("-c: the path is too long");
	if (options.workers > 1)
		stock = memory_share(sizeof(*stock));
	if (mkdir(options.cache, 0700) == -1 && errno != EEXIST)
		die("can't make the cache %s: %s", options.cache,
		    strerror(errno));
	store_path("CACHEDIR.TAG", path);
	fd = open(path, O_RDONLY | O_NONBLOCK);
	tagged = fd != -1 && fd_read(fd, text, sizeof(text) - 1) > 0 &&
	    strcmp(text, store_tag) == 0;
	fd_drop(&fd);
	error = directory_walk(options.cache, store_check, &tagged);
	if (error != 0)
		die("can't read the cache %s: %s", options.cache,
		    strerror(error));
	store_own(open(options.cache, O_RDONLY | O_DIRECTORY), options.cache);
	fd = tagged ? -1 : tag_make();
	store_assume(path, fd != -1);
	store_own(fd, path);
}

/*
 * Looks after the directory, once a turn.  Starts a sweep when enough was
 * written since the last one, or when room was lacking: so store_fits() seldom
 * fails, unless the sweeper is slow.  Of several workers the first sweeps: the
 * others wake it, by a signal that does nothing else.
 */
static void
store_sweep(void)
{
	if (options.cache == NULL)
		return;
	if (store.worker != worker) {
		/* A new worker: the entries of a dead one are dropped. */
		store.worker = worker;
		(void)directory_walk(options.cache, temporary_remove, NULL);
		stock->making[worker] = 0;
		/* A sweep that it began is repeated. */
		if (worker == 1)
			stock->swept =
			    stock_sum(stock->grown) - options.cache_size;
	}
	if (store.sweeper > 0)
		sweep_reap();
	/* What the others add to it is in their totals. */
	totals.stored = (worker <= 1 ? stock->base : 0) + stock->grown[worker] +
	    stock->making[worker];
	if (store.sweeper > 0)
		return;
	if (stock_sum(stock->grown) - stock->swept <= options.cache_size / 16 &&
	    (stock->lack == LACK_NONE || now.ms < store.lack_ms))
		return;
	if (worker <= 1)
		sweep_start();
	else if (now.ms >= store.lack_ms && workers[1].pid > 0) {
		store.lack_ms = now.ms + 1000;
		(void)kill(workers[1].pid, SIGCHLD);
	}
}

/* Prints the path of a file if it is an entry of the key. */
static void
key_visit(const struct file *f, void *argument)
{
	const struct text *key = argument;
	struct lookup l;

	if (!f->entry)
		return;
	l.b = work_buffer(WORK_REGION);
	entry_open(&l, f->path, 0, *key);
	if (l.fd != -1)
		printf("%s\n", f->path);
	fd_drop(&l.fd);
}

/* Prints the paths of the entries of a URL. */
static void
store_print(const struct target *target)
{
	struct text key = key_of(target);
	int error = store_walk(key_visit, &key);

	if (error != 0)
		die("can't read the cache %s: %s", options.cache,
		    strerror(error));
}

/* ---- 16. Cache: fetches ---- */

/*
 * A shared cache: a response that one client fetched may answer others (RFC
 * 9111).  These are the cache's part in the phases of an exchange.  It must
 * never give one client a response meant for another.
 *
 * Collapsed forwarding.  When several clients want the same at once, the
 * server is asked once.  The exchange that asks is the leader of a fetch; the
 * others are its followers.  Plain GETs wait for the response head,
 * COLLAPSE_MS at most.  If the response is stored, they read the growing
 * entry, each at its own pace, through its own descriptor, and never beyond
 * the bytes written.  If the response is uncacheable, each follower sends its
 * own request.  Then no request waits for that URL until one of its responses
 * can be stored, or until other URLs have taken its place in a small table.
 * If the leader's client leaves, the leader goes on without a client if the
 * entry is wanted.  If the leader's client is slower than the followers, the
 * fetch moves to a slot of its own, and the leader becomes a follower.  If a
 * fetch fails, a follower sends its own request.  If a strong validator shows
 * that the payload is still the same, the bytes that the follower's client
 * already has are skipped.  Otherwise the client's connection is cut off
 * visibly, since a truncated body must never seem complete.  So no exchange
 * may follow a fetch that has no strong validator and may run out of room.
 *
 * Door: cache_append, cache_detach, cache_invalidate, cache_stores,
 * fetch_begin, fetch_end, fetch_follow, fetch_store, fetch_unfollow, fetches,
 * key_is_uncacheable, key_remember, response_validator.
 */

enum {
	/* Keys known to be uncacheable: 128 KiB. */
	UNCACHEABLE_KEYS = 16384,
	/* The places in which each of them may be. */
	UNCACHEABLE_WAYS = 8
};

/* The cache's answer to a request, or to a response from a server. */
enum cached {
	CACHED_NO,   /* ask the server, or relay its response */
	CACHED_YES,  /* an entry answers */
	CACHED_WAIT, /* wait: another exchange is fetching it */
	CACHED_LOST, /* the entry to validate is gone: ask again */
	CACHED_NEVER /* no entry can answer, nor may the server */
};

/* The state of a fetch; set by fetch_enter() only. */
enum fetch_state {
	FETCH_ASKS,     /* no response head yet: followers wait */
	FETCH_STORES,   /* the entry grows: followers read it */
	FETCH_COMPLETE, /* it has ended: the entry is complete */
	FETCH_FAILED    /* it has ended, and stores no more */
};

/*
 * A fetch: a response that its leader gets from a server and others may follow.
 * It is given back when it has neither a leader nor followers.
 */
struct fetch {
	struct pooled pooled;
	struct fetch *next;      /* in fetches */
	struct exchange *leader; /* NULL when it has ended */
	enum fetch_state state;  /* set by fetch_enter() only */
	bool discard;            /* do not keep the entry */
	unsigned followers;      /* exchanges that wait for it or read it */
	uint32_t region;         /* length of the region in bytes */
	uint64_t key;            /* hash of the target's key */
	uint64_t length;         /* of the body; UINT64_MAX: unknown */
	uint64_t stored;         /* bytes of the body so far */
	uint64_t share;          /* bytes of disk counted for it */
	uint64_t validator;      /* see response_validator() */
	struct temporary file;   /* the entry that grows, if any */
};

/* ---- fetches ---- */

static struct fetch *fetches; /* that others may follow */
static struct pool fetch_pool = { .size = sizeof(struct fetch) };

/*
 * Lets y, which follows a complete fetch, read its entry like any other.  An
 * unknown length is known now: a file that ends earlier was cut.
 */
static void
follow_complete(struct exchange *y)
{
	struct request *q = y->request;

	answer_by(y, ANSWER_ENTRY);
	if (q->body != UINT64_MAX)
		return;
	q->body = q->caching.stored;
	if (y->phase == PHASE_RELAY && y->down.from == FRAMING_CLOSE) {
		y->down.from = FRAMING_LENGTH;
		y->down.left = q->body - y->down.payload - y->down.ready;
	}
}

/* Queues the followers of a fetch to run. */
static void
fetch_tell(const struct fetch *f)
{
	struct exchange *y;

	if (f->followers == 0)
		return;
	for (y = exchanges.slots; y < exchanges.slots + exchanges.used; y++) {
		struct request *q = y->request;

		if (q == NULL || q->caching.follows != f)
			continue;
		if (q->answerer == ANSWER_FETCH) {
			y->server.readable = true;
			q->caching.miss = f->leader->request->caching.miss;
			q->caching.stored = f->stored;
			if (f->state == FETCH_COMPLETE)
				follow_complete(y);
			else if (f->state == FETCH_FAILED)
				answer_by(y, ANSWER_FAILED);
		} else if (q->answerer == ANSWER_AWAITED)
			answer_by(y, ANSWER_NONE);
		exchange_queue(y);
	}
}

/*
 * Sets the state of a fetch and queues its followers, which wait for the head
 * or read the entry.
 */
static void
fetch_enter(struct fetch *f, enum fetch_state state)
{
	static const char names[][24] = { "asks", "stores", "is complete",
		"ends without an entry" };

	if (f->state != state)
		trace(f->leader, "the fetch %s", names[state]);
	f->state = state;
	fetch_tell(f);
}

/* Gives f back if nobody has a part in it any more. */
static void
fetch_drop(struct fetch *f)
{
	if (f->leader == NULL && f->followers == 0)
		pool_give(&fetch_pool, &f->pooled);
}

/*
 * Makes x the leader of a fetch for the key of its request.  Without memory
 * there is none: others then ask for themselves.
 */
static void
fetch_begin(struct exchange *x)
{
	struct fetch *f = pool_take(&fetch_pool, 0);

	if (f == NULL)
		return;
	memset(f, 0, offsetof(struct fetch, file.path));
	f->leader = x;
	f->key = x->request->caching.key;
	f->discard = x->request->caching.outdated;
	f->file.fd = -1;
	f->next = fetches;
	fetches = f;
	x->request->caching.fetch = f;
}

/*
 * Ends the fetch that x leads, if any: it can't be followed any more.  What it
 * has stored is removed, unless it is in its place.
 */
static void
fetch_end(struct exchange *x, enum fetch_state state)
{
	struct caching *c = &x->request->caching;
	struct fetch *f = c->fetch, **at = &fetches;

	if (f == NULL)
		return;
	while (*at != f)
		at = &(*at)->next;
	*at = f->next;
	stock->making[worker] -= f->share;
	temporary_close(&f->file);
	fetch_enter(f, state);
	f->leader = NULL;
	c->fetch = NULL;
	fetch_drop(f);
}

/* Makes x a follower of f. */
static void
fetch_follow(struct exchange *x, struct fetch *f)
{
	struct caching *c = &x->request->caching;

	c->collapsed = true;
	c->follows = f;
	c->stored = f->stored;
	c->validator = f->validator;
	f->followers++;
	exchange_queue(f->leader);
}

/* Makes x stop following its fetch, if any; gives an unused fetch back. */
static void
fetch_unfollow(struct exchange *x)
{
	struct fetch *f = x->request->caching.follows;

	x->request->caching.follows = NULL;
	if (f == NULL)
		return;
	f->followers--;
	if (f->leader != NULL)
		exchange_queue(f->leader);
	fetch_drop(f);
}

/*
 * y, a new exchange without a client, continues the work of x.  If x leads a
 * fetch, y becomes its leader, and x a follower; returns a descriptor of the
 * entry, to read behind what x's client has, or -1 if that fails, and nothing
 * has changed.  Else y begins a fetch, to revalidate the entry that answers x;
 * -1.
 */
static int
cache_detach(struct exchange *x, struct exchange *y)
{
	struct request *q = x->request;
	struct fetch *f = q->caching.fetch;
	int fd;

	if (f == NULL) {
		y->request->caching.key = q->caching.key;
		fetch_begin(y);
		return -1;
	}
	fd = open(f->file.path, O_RDONLY);
	if (fd != -1 &&
	    lseek(fd, (off_t)(f->region + x->down.payload), SEEK_SET) == -1)
		fd_drop(&fd);
	if (fd == -1)
		return -1;
	y->record.status = x->record.status;
	y->record.end = END_CLIENT;
	y->record.server = x->record.server;
	y->close = true;
	y->request->method = q->method;
	y->request->caching = q->caching;
	q->caching.fetch = NULL;
	q->body = f->length;
	f->leader = y;
	fetch_follow(x, f);
	answer_by(x, ANSWER_FETCH);
	return fd;
}

/*
 * Keys whose responses were recently uncacheable: no request waits for them.
 * Pages never written take no memory.
 */
static uint64_t uncacheable[UNCACHEABLE_KEYS];

/* Where the key is, or else the last of its places. */
static uint64_t *
key_place(uint64_t key)
{
	uint64_t *at = uncacheable +
	    key % (UNCACHEABLE_KEYS / UNCACHEABLE_WAYS) * UNCACHEABLE_WAYS;
	const uint64_t *last = at + UNCACHEABLE_WAYS - 1;

	while (at < last && *at != key)
		at++;
	return at;
}

/* True if responses for the key were recently uncacheable. */
static bool
key_is_uncacheable(uint64_t key)
{
	return *key_place(key) == key;
}

/*
 * Remembers whether responses for a key are uncacheable.  The latest key is
 * first in its places; the last one is replaced.
 */
static void
key_remember(uint64_t key, bool is_uncacheable)
{
	uint64_t *at = key_place(key);
	uint64_t *first = at - (at - uncacheable) % UNCACHEABLE_WAYS;

	if (is_uncacheable) {
		memmove(first + 1, first, (size_t)(at - first) * sizeof(*at));
		*first = key;
	} else if (*at == key)
		*at = 0;
}

/* True if x is storing what it fetches. */
static bool
cache_stores(const struct exchange *x)
{
	const struct fetch *f = x->request->caching.fetch;

	return f != NULL && f->state == FETCH_STORES;
}

/*
 * True if enough of the disk is free: see CACHE_FLOOR.  Some file systems in
 * memory have no size.
 */
static bool
disk_has_room(void)
{
	struct statvfs disk;

	if (statvfs(options.cache, &disk) == -1 || disk.f_blocks == 0 ||
	    (uint64_t)disk.f_bavail * disk.f_frsize > CACHE_FLOOR ||
	    disk.f_bavail > disk.f_blocks / 20)
		return true;
	store_lacks_disk("it is nearly full");
	return false;
}

/*
 * Builds the region of a new entry in `region`; its first line does not know
 * the body's length yet.  False if it is too long.
 */
static bool
region_draft(struct exchange *x, const struct response *r,
    struct buffer *region)
{
	struct request *q = x->request;
	struct buffer *variant = work_buffer(WORK_VARIANT);
	struct buffer *head = work_buffer(WORK_HEAD);
	struct entry e = { .key = key_of(&q->target),
		.requested = q->times.requested,
		.responded = now.wall,
		.age = initial_age(r, q->times.requested, now.wall),
		.counted = r->framing == FRAMING_CHUNKED ||
		    r->framing == FRAMING_CLOSE };

	q->caching.key = key_hash(e.key);
	if (!variant_of(q, r, variant))
		return false;
	e.variant = buffer_text(variant);
	e.server = text_of(
	    exchange_parent(x) ? "-" : address_words(&x->record.server));
	stored_head_append(r, NULL, true, head);
	return !head->overflow &&
	    region_build(region, &e, buffer_text(head), 0);
}

/*
 * A hash: responses with the same one have the same payload, byte for byte; 0
 * if there is no strong validator.  With a weak entity tag the payload may
 * differ, and without a tag several codings may have the same date.
 */
static uint64_t
response_validator(const struct response *r)
{
	struct text t = head_value(&r->head, "ETag");

	if (t.len == 0)
		t = modified_strong(&r->head);
	if (t.len == 0 || text_starts(t, "W/"))
		return 0;
	return hash_text(key_hash(t), head_value(&r->head, "Content-Encoding"));
}

/* Makes the temporary file of a fetch with its region; false on failure. */
static bool
fetch_open(struct fetch *f, const struct response *r, struct text region)
{
	f->region = (uint32_t)region.len;
	f->validator = response_validator(r);
	f->length = r->framing == FRAMING_CHUNKED ||
		r->framing == FRAMING_CLOSE ?
	    UINT64_MAX :
	    r->length;
	/* The entry may need a new directory, too. */
	f->share = store.block +
	    disk_bytes(region.len + (f->length == UINT64_MAX ? 0 : f->length));
	/* Taken first and then judged, as other workers do the same. */
	stock->making[worker] += f->share;
	return store_fits(0) && temporary_open(&f->file) &&
	    write_at(f->file.fd, region, 0);
}

/*
 * Begins to store a response, and a fetch if there is none yet.  Followers that
 * waited for this head may read the entry.  False if it can't be stored.
 */
static bool
fetch_store(struct exchange *x, const struct response *r)
{
	struct buffer *region = work_buffer(WORK_REGION);
	struct caching *c = &x->request->caching;

	if (!disk_has_room() || !region_draft(x, r, region))
		return false;
	if (c->fetch == NULL)
		fetch_begin(x);
	if (c->fetch == NULL || !fetch_open(c->fetch, r, buffer_text(region)))
		return false;
	fetch_enter(c->fetch, FETCH_STORES);
	return true;
}

/*
 * True if a body of unknown length may take n more bytes of the disk.  Together
 * all entries being stored take at most a quarter of the cache; one that proves
 * longer is not kept, but goes on for followers that could not request the
 * rest.
 */
static bool
fetch_fits(struct exchange *x, uint64_t n)
{
	struct caching *c = &x->request->caching;
	struct fetch *f = c->fetch;

	if (stock_sum(stock->making) + n > options.cache_size / 4) {
		bool large = f->share + n > options.cache_size / 4;

		f->discard = true;
		c->miss = large ? "too-large" : "no-room";
		if (large)
			key_remember(f->key, true);
		if (f->followers == 0 || f->validator != 0)
			return false;
	}
	if (store_fits(n))
		return true;
	if (!f->discard)
		c->miss = "no-room";
	return false;
}

/*
 * Writes the length of the entry that a fetch has stored, and puts it in its
 * place.  The marker of a variant is written only now: it replaces an entry
 * without variants.  False if that fails.
 */
static bool
fetch_place(struct fetch *f)
{
	struct buffer *list = work_buffer(WORK_LIST);
	struct buffer *name = work_buffer(WORK_VARIANT);
	struct lookup l;

	l.fd = f->file.fd;
	l.b = work_buffer(WORK_REGION);
	if (!entry_read(&l, f->region) || !vary_append(&l.r, list))
		return false;
	if (buffer_len(list) > 0) {
		if (!marker_token(l.e.key, buffer_text(list), l.r.status == 206,
			name))
			return false;
		buffer_word(name, ";");
		buffer_append(name, l.e.variant);
	}
	entry_path(l.e.key, buffer_text(name), l.path);
	region_seal(l.b, f->stored);
	return write_at(l.fd, text_cut(buffer_text(l.b).at, REGION_LINE), 0) &&
	    temporary_place(&f->file, f->region + f->stored, l.path);
}

/*
 * Stores a piece of payload, and with `whole` its end, if x is storing what it
 * fetches; a failure costs only the entry.  Of a broken response nothing is
 * kept.
 */
static void
cache_append(struct exchange *x, struct text t, bool whole)
{
	struct caching *c = &x->request->caching;
	struct fetch *f = c->fetch;
	uint64_t end, n = 0;
	bool good;

	if (!cache_stores(x))
		return;
	end = f->region + f->stored;
	if (f->length == UINT64_MAX)
		n = disk_bytes(end + t.len) - disk_bytes(end);
	good = !x->down.broken && (n == 0 || fetch_fits(x, n));
	if (good && !write_at(f->file.fd, t, (off_t)end)) {
		c->miss = "no-room";
		good = false;
	}
	if (!good) {
		fetch_end(x, FETCH_FAILED);
		return;
	}
	f->stored += t.len;
	f->share += n;
	stock->making[worker] += n;
	if (!whole) {
		fetch_tell(f);
		return;
	}
	if (!f->discard)
		c->miss = fetch_place(f)    ? "stored" :
		    x->record.status == 206 ? "range" :
					      "no-room";
	/* The followers have the complete body in any case. */
	fetch_end(x, FETCH_COMPLETE);
}

/*
 * Removes the entries of a target.  A request under way may bring an older
 * response, so its entry is not kept.
 */
static void
cache_forget(const struct target *target)
{
	struct text key = key_of(target);
	uint64_t hash = key_hash(key);
	char path[CACHE_PATH];
	struct exchange *y;
	struct caching *c;

	entry_path(key, text_of(""), path);
	(void)unlink(path);
	for (y = exchanges.slots; y < exchanges.slots + exchanges.used; y++) {
		if (y->request == NULL || y->request->caching.key != hash)
			continue;
		c = &y->request->caching;
		c->outdated = true;
		if (c->fetch != NULL)
			c->fetch->discard = true;
		if (cache_stores(y))
			c->miss = "outdated";
	}
}

/*
 * Appends the segments of a path to that in b, which begins and ends with a
 * slash: . is dropped, and .. removes the one before (RFC 3986 section 5.2.4).
 */
static void
segments_append(struct buffer *b, struct text path)
{
	while (path.len > 0) {
		struct text whole = path, segment = text_split(&path, '/');

		if (text_is(segment, "..")) {
			b->end -= buffer_len(b) > 1;
			while (b->data[b->end - 1] != '/')
				b->end--;
		} else if (!text_is(segment, "."))
			buffer_append(b,
			    text_cut(whole.at, whole.len - path.len));
	}
}

/*
 * Sets path to the path and query of a reference that is not empty (RFC 3986
 * section 5.2), built in b; false if it names another server.
 */
static bool
reference_resolve(const struct target *own, struct text value, struct buffer *b,
    struct text *path)
{
	struct text base = text_until(own->path, "?"), name;
	struct target target;

	if (text_starts(value, "//") ||
	    text_find(value, ':') < text_until(value, "/?").len) {
		if (absolute_parse(value, &target) != 1 ||
		    !text_same(target.host, own->host) ||
		    target.port != own->port)
			return false;
		value = target.path;
		base.len = 0;
	}
	name = text_until(value, "?");
	while (name.len > 0 && base.len > 0 &&
	    (*name.at == '/' || base.at[base.len - 1] != '/'))
		base.len--;
	if (name.len > 0 || base.len == 0) {
		buffer_word(b, "/");
		segments_append(b, text_from(base, text_starts(base, "/")));
		segments_append(b, text_from(name, text_starts(name, "/")));
	} else
		buffer_append(b, base);
	buffer_append(b, text_from(value, name.len));
	*path = buffer_text(b);
	return !b->overflow;
}

/*
 * After a successful unsafe request, invalidates what is stored for its target
 * and, on the same server, for Location and Content-Location (RFC 9111 section
 * 4.4).
 */
static void
cache_invalidate(const struct request *q, const struct response *r)
{
	static const char *const fields[] = { "Location", "Content-Location" };
	const struct target *own = &q->target;
	struct target other = *own;
	size_t i;

	if (options.cache == NULL || q->method == METHOD_GET ||
	    q->method == METHOD_HEAD || q->method == METHOD_CONNECT ||
	    q->method == METHOD_TRACE || q->method == METHOD_OPTIONS ||
	    r->status < 200 || r->status >= 400)
		return;
	cache_forget(own);
	for (i = 0; i < sizeof(fields) / sizeof(fields[0]); i++) {
		struct text value = head_value(&r->head, fields[i]);

		value.len = text_find(value, '#');
		if (value.len > 0 &&
		    reference_resolve(own, value, work_buffer(WORK_VARIANT),
			&other.path))
			cache_forget(&other);
	}
}

/* ---- 17. Cache: look-ups and validation ---- */

/*
 * Finds the entry that may answer a request, judges it, and has it validated;
 * decides whether a response may be stored; and builds the head that is sent
 * from an entry.
 *
 * Door: cache_fields_append, cache_find, cache_leave, cache_shape,
 * cache_store, cache_validate, cache_wants.
 */

/*
 * The rule that decides how a request, or its response r if that is not NULL,
 * is cached; without one, a rule that says nothing about that.  e is the entry
 * with the head r, or NULL.
 */
static const struct rule *
cache_rule(const struct exchange *x, const struct response *r,
    const struct entry *e)
{
	static const struct rule other = { .action = ACTION_ALLOW };
	struct address server;
	struct verdict verdict;

	if (x->rules->first[GROUP_CACHE] == NULL)
		return &other;
	if (e != NULL)
		server = address_read(e->server);
	verdict = rules_judge(x, GROUP_CACHE, r, e ? &server : NULL);
	return verdict.rule ? verdict.rule : &other;
}

/* The lifetime in seconds that a rule gives, -1 if it gives none. */
static int64_t
rule_seconds(const struct rule *rule)
{
	return rule->action == ACTION_CACHE ?
	    (int64_t)(rule->amount.first / 1000) :
	    -1;
}

/* The fetch for the key that may still be followed, or NULL. */
static struct fetch *
fetch_for(uint64_t key)
{
	struct fetch *f = fetches;

	while (f != NULL && (f->key != key || f->discard))
		f = f->next;
	return f;
}

/*
 * True if a follower of this fetch will get the complete body: it can request
 * the rest itself; or, if the length is unknown, -s has room for the largest
 * possible body; or, if it is known, the disk has room for twice all that is
 * being stored, since other programs write there, too.  If they fill it
 * nevertheless, the follower's response is visibly truncated.  Reserving the
 * room would prevent that, but some file systems then write every block, while
 * all other clients wait.  Never if the leader's rules may still forbid the
 * body: the fetch ends then.
 */
static bool
follow_is_safe(const struct fetch *f)
{
	struct statvfs disk;

	if (f->validator != 0 || f->leader->request->access.answer != NULL)
		return f->validator != 0;
	if (f->length == UINT64_MAX)
		return f->share >= options.cache_size / 4 ||
		    store_fits(options.cache_size / 4 - f->share);
	return statvfs(options.cache, &disk) != -1 &&
	    (uint64_t)disk.f_bavail * disk.f_frsize / 2 >=
	    stock_sum(stock->making);
}

/*
 * True if the entry in l may answer the request at all: no rule forbids it, and
 * its status fits the request.
 */
static bool
lookup_fits(const struct exchange *x, const struct lookup *l)
{
	const struct request *q = x->request;

	return cache_rule(x, &l->r, &l->e)->action != ACTION_NOCACHE &&
	    (l->r.status != 206 ||
		(q->method == METHOD_GET && !head_has(&q->head, "If-Range")));
}

/*
 * Sets the age and the remaining lifetime of the entry in l, and reads its
 * Cache-Control; returns where its lifetime is from.
 */
static const char *
lookup_age(struct exchange *x, struct lookup *l)
{
	struct caching *c = &x->request->caching;
	int64_t given = rule_seconds(cache_rule(x, &l->r, &l->e));
	struct lifetime lifetime;

	l->control = control_parse(&l->r.head);
	lifetime = freshness_lifetime(&l->r, &l->control, false);
	if (given >= 0)
		lifetime = (struct lifetime){ given, "a rule" };
	c->age = l->e.age +
	    (now.wall > l->e.responded ? now.wall - l->e.responded : 0);
	c->ttl = (lifetime.seconds > 0 ? lifetime.seconds : 0) - c->age;
	return lifetime.why;
}

/* How the entry in l may be used; traces the calculation. */
static enum reuse
lookup_judge(struct exchange *x, const struct control *asked, struct lookup *l)
{
	static const char *const words[] = { [REUSE_FRESH] = "fresh",
		[REUSE_STALE] = "stale, which the client takes",
		[REUSE_MEANWHILE] = ("stale, which is good while it is "
				     "validated"),
		[REUSE_VALIDATED] = "to be validated" };
	const struct caching *c = &x->request->caching;
	const char *why = lookup_age(x, l);
	int64_t lifetime = c->ttl + c->age;
	bool young = c->ttl > 0 && !l->control.no_cache;
	enum reuse reuse = REUSE_VALIDATED;

	if (!x->refresh && l->e.responded <= now.wall + CLOCK_STEP_S)
		reuse = reuse_judge(asked, &l->control, c->age, lifetime);
	l->forward = young ? "request" : "stale";
	trace(x, "stored: age %lld s %s lifetime %lld s (%s)%s: %s%s",
	    (long long)c->age, c->ttl > 0 ? "<" : ">=", (long long)lifetime,
	    why, l->control.no_cache ? ", no-cache" : "", words[reuse],
	    reuse != REUSE_VALIDATED || !young ? "" :
		x->refresh                     ? ", in the background" :
						 ", by the client's wish");
	return reuse;
}

/*
 * Looks for a stored entry; l need not be set.  The caller takes over the
 * descriptor and the buffer.
 */
static void
lookup_run(struct exchange *x, const struct control *asked, struct lookup *l)
{
	struct request *q = x->request;
	struct text key = key_of(&q->target);

	q->caching.key = key_hash(key);
	q->caching.outdated = false;
	l->fd = -1;
	l->reuse = REUSE_VALIDATED;
	l->forward = "uri-miss";
	l->b = buffer_take();
	if (l->b == NULL)
		return;
	entry_find(q, key, l);
	if (l->fd != -1 && lookup_fits(x, l))
		l->reuse = lookup_judge(x, asked, l);
	else
		fd_drop(&l->fd);
}

/* True if the server must not act on another version (RFC 9110 13.1). */
static bool
request_is_guarded(const struct request *q)
{
	return head_has(&q->head, "If-Match") ||
	    head_has(&q->head, "If-Unmodified-Since");
}

/*
 * Looks among the fetches under way if no complete entry will do: an entry
 * being stored is the answer if it is fresh, and x selects that variant.
 */
static void
lookup_follow(struct exchange *x, const struct control *asked, struct lookup *l)
{
	struct request *q = x->request;
	struct caching *c = &q->caching;
	struct text key = key_of(&q->target);
	struct fetch *f;
	int fd;

	if (l->b == NULL || x->refresh || asked->no_store ||
	    request_is_guarded(q) || head_has(&q->head, "Range") ||
	    head_has(&q->head, "Authorization"))
		return;
	for (f = fetches; f != NULL && c->follows == NULL; f = f->next) {
		if (f->state != FETCH_STORES || f->discard || f->key != c->key)
			continue;
		if (f->length == UINT64_MAX && key_is_uncacheable(c->key))
			continue;
		fd = l->fd;
		entry_open(l, f->file.path, f->region, key);
		l->e.body = l->r.length = f->length;
		if (l->fd != -1 && lookup_fits(x, l) &&
		    variant_fits(&l->e, &l->r, q) && follow_is_safe(f) &&
		    lookup_judge(x, asked, l) == REUSE_FRESH) {
			fetch_follow(x, f);
			l->reuse = REUSE_FRESH;
			fd_drop(&fd);
		} else {
			fd_drop(&l->fd);
			l->fd = fd;
		}
	}
}

/*
 * True if q may lead a fetch, or wait for the head of one: a plain GET, whose
 * response may well suit other clients.
 */
static bool
request_is_common(const struct request *q, const struct control *asked)
{
	size_t i;

	for (i = 0; i < q->head.n; i++)
		if (name_is_among(field_name(&q->head, i), fields_of_condition))
			return false;
	return q->method == METHOD_GET && !asked->no_store &&
	    !asked->no_cache && asked->max_age != 0 &&
	    !head_has(&q->head, "Authorization") &&
	    !head_has(&q->head, "Range");
}

/*
 * Makes x wait for the head of a fetch for its key, if it may; true if so.  A
 * request waits only once, and never for a URL known to be uncacheable: else
 * requests that wait in vain would be delayed one after the other.
 */
static bool
follow_wait(struct exchange *x)
{
	struct caching *c = &x->request->caching;
	struct fetch *f = fetch_for(c->key);

	if (f == NULL || f->state != FETCH_ASKS || c->collapsed || x->refresh ||
	    key_is_uncacheable(c->key))
		return false;
	fetch_follow(x, f);
	answer_by(x, ANSWER_AWAITED);
	return true;
}

/* Sets the state of x's request in the cache. */
static void
caching_enter(struct exchange *x, enum caching_state state)
{
	static const char names[][32] = { "does nothing", "is bypassed",
		"has the answer", "has an entry to validate",
		"has the answer after validation",
		"has an entry that is superseded" };
	struct caching *c = &x->request->caching;

	if (c->state != state)
		trace(x, "the cache %s", names[state]);
	c->state = state;
}

/* True if the cache may answer the request, or store the response to GET. */
static bool
request_is_cacheable(struct exchange *x, const struct rule *rule)
{
	struct request *q = x->request;

	/* Rules may still change the request that is sent. */
	if (q->rewrites.undecided)
		caching_enter(x, CACHING_BYPASSED);
	if (q->rewrites.undecided || q->upgrade ||
	    (q->method != METHOD_GET && q->method != METHOD_HEAD) ||
	    q->framing != FRAMING_NO_BODY)
		return false;
	if (rule->action != ACTION_NOCACHE)
		return true;
	caching_enter(x, CACHING_BYPASSED);
	q->caching.miss = "rule";
	return false;
}

/*
 * Makes the entry in l the answer; word: for the log.  The caller takes over
 * the buffer and the descriptor, which is read from behind the buffer.
 */
static enum cached
lookup_answers(struct exchange *x, struct lookup *l, const char *word)
{
	struct caching *c = &x->request->caching;

	entry_touch(l->fd, &l->e);
	c->hit = word;
	caching_enter(x,
	    c->state == CACHING_VALIDATES ? CACHING_VALIDATED : CACHING_HIT);
	c->region = (uint32_t)l->e.region;
	fetch_end(x, FETCH_COMPLETE);
	answer_by(x, c->follows != NULL ? ANSWER_FETCH : ANSWER_ENTRY);
	return CACHED_YES;
}

/*
 * Looks for an entry, or a fetch under way, for the request of x.  CACHED_YES:
 * l answers, and the caller takes over its fd and b; CACHED_WAIT: x follows a
 * fetch; CACHED_NEVER: only an entry may answer, and none can; CACHED_NO: x
 * keeps an entry to validate, if any, and leads a fetch, if it may.
 */
static enum cached
cache_find(struct exchange *x, struct lookup *l)
{
	struct request *q = x->request;
	struct caching *c = &q->caching;
	struct control asked;
	const struct rule *rule;
	bool common, offline;

	/* On a second call, x has waited. */
	fetch_unfollow(x);
	answer_by(x, ANSWER_NONE);
	rule = cache_rule(x, NULL, NULL);
	offline = rule->action == ACTION_OFFLINE;
	if (options.cache == NULL)
		return offline ? CACHED_NEVER : CACHED_NO;
	asked = control_parse(&q->head);
	asked.only_if_cached = asked.only_if_cached || offline;
	if (!request_is_cacheable(x, rule))
		return asked.only_if_cached ? CACHED_NEVER : CACHED_NO;
	lookup_run(x, &asked, l);
	if (!c->collapsed)
		c->forward = l->forward;
	if (offline && l->fd != -1 && l->reuse != REUSE_FRESH)
		l->reuse = REUSE_STALE;
	if (l->fd != -1 && l->r.status / 100 == 2 && request_is_guarded(q) &&
	    !request_is_met(&q->head, &l->r))
		l->reuse = REUSE_VALIDATED;
	else if (l->reuse == REUSE_VALIDATED)
		lookup_follow(x, &asked, l);
	if (l->reuse == REUSE_MEANWHILE && fetch_for(c->key) != NULL)
		l->reuse = REUSE_STALE;
	if (l->reuse != REUSE_VALIDATED)
		return lookup_answers(x, l,
		    l->reuse != REUSE_FRESH ? "stale" :
			c->collapsed        ? "collapsed" :
					      "fresh");
	buffer_give(&l->b);
	c->miss = c->forward;
	common = request_is_common(q, &asked);
	if (asked.only_if_cached || (common && follow_wait(x))) {
		fd_drop(&l->fd);
		return asked.only_if_cached ? CACHED_NEVER : CACHED_WAIT;
	}
	if (l->fd != -1 && request_is_guarded(q)) {
		/*
		 * With our validators in place of its conditions, a part of
		 * another version could seem to meet them: it is sent
		 * unchanged.
		 */
		fd_drop(&l->fd);
	} else if (l->fd != -1) {
		c->entry = l->fd;
		caching_enter(x, CACHING_VALIDATES);
		(void)text_copy(text_of(l->path + strlen(options.cache) + 1),
		    c->path, ENTRY_PATH);
	}
	if (common && c->fetch == NULL)
		fetch_begin(x);
	return CACHED_NO;
}

/* Closes the entry to validate, if any, and enters another state. */
static void
entry_close(struct exchange *x, enum caching_state state)
{
	struct caching *c = &x->request->caching;

	if (c->state != CACHING_VALIDATES)
		return;
	(void)close(c->entry);
	caching_enter(x, state);
}

/*
 * Reads the entry to validate anew into l; the caller gives back its buffer.
 * False, without a buffer, if there is none or it is damaged.
 */
static bool
entry_load(const struct exchange *x, struct lookup *l)
{
	const struct caching *c = &x->request->caching;

	l->fd = c->entry;
	l->reuse = REUSE_FRESH;
	l->b = c->state == CACHING_VALIDATES ? buffer_take() : NULL;
	if (l->b != NULL && lseek(l->fd, 0, SEEK_SET) != -1 && entry_read(l, 0))
		return true;
	buffer_give(&l->b);
	return false;
}

/* Appends the entry's validators to a request (RFC 9111 section 4.3.1). */
static void
validators_append(const struct exchange *x, struct buffer *b)
{
	struct lookup l;
	struct text t;

	if (!entry_load(x, &l))
		return;
	t = head_value(&l.r.head, "ETag");
	if (t.len > 0)
		line_append(b, text_of("If-None-Match"), t);
	t = head_value(&l.r.head, "Last-Modified");
	if (t.len > 0)
		line_append(b, text_of("If-Modified-Since"), t);
	buffer_give(&l.b);
}

/*
 * True if the entry in l may answer stale after a failure of the server, or
 * its error response (answered).
 */
static bool
lookup_rescues(struct exchange *x, bool answered, struct lookup *l)
{
	struct control asked = control_parse(&x->request->head);

	(void)lookup_age(x, l);
	return l->e.responded <= now.wall + CLOCK_STEP_S &&
	    reuse_on_error(&asked, &l->control, -x->request->caching.ttl,
		answered);
}

/*
 * Puts head in the place of the stored one in l, as the client's answer.  False
 * if there is no room.
 */
static bool
lookup_renew(struct lookup *l, struct text head)
{
	l->b->end = (size_t)(l->e.head.at - l->b->data);
	buffer_append(l->b, head);
	l->e.head.len = head.len;
	return l->b->overflow == 0 && entry_response(l) &&
	    lseek(l->fd, (off_t)l->e.region, SEEK_SET) != -1;
}

/*
 * Rewrites the region of the entry in l in place, with the fields of news, a
 * 304 or the response to a HEAD; with its cookies only if the entry is for
 * their client alone.  Removes the entry if it may no longer be stored, is now
 * another variant, or has no room; but a request whose response may not be
 * stored leaves the entry as it is.  The client gets all new fields in any
 * case; false if they have no room in l.
 */
static bool
entry_freshen(struct exchange *x, const struct response *news, struct lookup *l)
{
	const struct request *q = x->request;
	const struct rule *rule = cache_rule(x, NULL, NULL);
	struct buffer *region = work_buffer(WORK_REGION);
	struct buffer *head = work_buffer(WORK_HEAD);
	struct control asked = control_parse(&q->head);
	struct response merged;

	l->e.requested = q->times.requested;
	l->e.responded = now.wall;
	l->e.age = initial_age(news, q->times.requested, now.wall);
	stored_head_append(news, &l->r, response_is_personal(&l->r), head);
	if (head->overflow ||
	    response_parse(buffer_text(head), METHOD_GET, &merged) != 1)
		return false;
	if (response_obstacle(q, &merged, rule_seconds(rule)) == NULL &&
	    variant_fits(&l->e, &merged, q) &&
	    region_build(region, &l->e, buffer_text(head), l->e.region))
		(void)write_at(l->fd, buffer_text(region), 0);
	else if (!asked.no_store && !head_has(&q->head, "Authorization"))
		store_remove(q->caching.path);
	if (head_has(&news->head, "Set-Cookie"))
		stored_head_append(news, &l->r, true, buffer_clear(head));
	return !head->overflow && lookup_renew(l, buffer_text(head));
}

/*
 * True if the response to a HEAD, or a part of a body, is from the version in
 * l: the validators are the same, and for a HEAD the length, if it has one.  A
 * HEAD with validators then updates the entry (RFC 9111 section 4.3.5).
 */
static bool
lookup_resembles(struct exchange *x, const struct response *r, struct lookup *l)
{
	struct text tag = head_value(&r->head, "ETag");
	struct text date = head_value(&r->head, "Last-Modified");
	uint64_t length = response_length(r);
	bool same = text_equals(tag, head_value(&l->r.head, "ETag")) &&
	    text_equals(date, head_value(&l->r.head, "Last-Modified")) &&
	    (r->status == 206 || length == UINT64_MAX || length == l->e.body);

	if (same && r->status == 200 && tag.len + date.len > 0)
		(void)entry_freshen(x, r, l);
	return same;
}

/* True if r has the same payload as the failed fetch that x followed. */
static bool
response_goes_on(const struct exchange *x, const struct response *r)
{
	const struct request *q = x->request;

	return r->status == x->record.status && q->caching.validator != 0 &&
	    response_validator(r) == q->caching.validator &&
	    (x->down.to != FRAMING_LENGTH ||
		(r->framing == FRAMING_LENGTH && r->length == q->body));
}

/*
 * Handles a server's response, or its failure if r is NULL, for an entry to
 * validate.  CACHED_YES: the entry answers, in l; CACHED_LOST: a 304 is about
 * another version, or the entry is damaged, so ask the server again; CACHED_NO:
 * r answers; CACHED_NEVER: it must continue a body, and is another.  A response
 * invalidates entries even if rules forbid it.
 */
static enum cached
cache_validate(struct exchange *x, const struct response *r, struct lookup *l)
{
	struct request *q = x->request;
	struct caching *c = &q->caching;
	int status = r == NULL ? 0 : r->status;
	bool failed = r == NULL || status == 500 ||
	    (status >= 502 && status <= 504);
	bool partial = status == 206 || q->method == METHOD_HEAD;
	/* An error that is about the request says nothing of the entry. */
	bool same = failed || status_is_among(status, personal_statuses);

	if (r != NULL)
		cache_invalidate(q, r);
	if (x->record.status != 0 && status >= 200)
		return response_goes_on(x, r) ? CACHED_NO : CACHED_NEVER;
	if (c->state != CACHING_VALIDATES || (status > 0 && status < 200))
		return CACHED_NO;
	c->forward_status = status;
	if ((failed || partial || status == 304) && entry_load(x, l)) {
		if (failed && lookup_rescues(x, r != NULL, l))
			return lookup_answers(x, l, "stale");
		if (status == 304 && response_is_same(r, &l->r) &&
		    entry_freshen(x, r, l)) {
			(void)lookup_age(x, l);
			return lookup_answers(x, l, "validated");
		}
		same = same || lookup_resembles(x, r, l);
		buffer_give(&l->b);
	}
	if (status == 304) {
		store_remove(c->path);
		entry_close(x, CACHING_NONE);
		return CACHED_LOST;
	}
	/* A part must not replace the whole. */
	if (r != NULL)
		entry_close(x,
		    !same             ? CACHING_SUPERSEDED :
			status == 206 ? CACHING_BYPASSED :
					CACHING_NONE);
	return CACHED_NO;
}

/* Why a final response is not stored, in a word; NULL if it is. */
static const char *
cache_obstacle(const struct exchange *x, const struct response *r)
{
	const struct request *q = x->request;
	const struct rule *rule = cache_rule(x, r, NULL);
	const char *why;

	if (rule->action == ACTION_NOCACHE)
		return "rule";
	if (q->caching.state == CACHING_BYPASSED)
		return r->status == 206 ? "range" : "rule";
	if (q->method == METHOD_HEAD ||
	    (q->caching.forward == NULL && q->method != METHOD_POST))
		return "method";
	why = response_obstacle(q, r, rule_seconds(rule));
	if (why == NULL && !vary_append(r, work_buffer(WORK_LIST)))
		why = "vary-*";
	if (why != NULL || r->framing != FRAMING_LENGTH ||
	    r->length + stock_sum(stock->making) <= options.cache_size / 4)
		return why;
	return r->length > options.cache_size / 4 ? "too-large" : "no-room";
}

/*
 * Handles a final response from a server: begins to store it, or tells those
 * who follow the fetch that it is not stored.
 */
static void
cache_store(struct exchange *x, const struct response *r)
{
	struct request *q = x->request;
	struct caching *c = &q->caching;
	const char *why;

	c->forward_status = r->status;
	if (options.cache == NULL)
		return;
	why = cache_obstacle(x, r);
	if (why == NULL && !fetch_store(x, r))
		why = "no-room";
	if (c->fetch != NULL)
		key_remember(c->key, why != NULL);
	/* A part replaces nothing else, see marker_token(). */
	if (c->state == CACHING_SUPERSEDED && (why != NULL || r->status == 206))
		store_remove(c->path);
	if (why == NULL) {
		c->miss = c->fetch->discard ? "outdated" : "incomplete";
		return;
	}
	trace(x, "not stored: %s", why);
	if (c->miss != NULL)
		c->miss = why;
	fetch_end(x, FETCH_FAILED);
}

/* Gives up x's fetch and entry: its request ends or is answered otherwise. */
static void
cache_leave(struct exchange *x)
{
	fetch_end(x, FETCH_FAILED);
	fetch_unfollow(x);
	entry_close(x, CACHING_NONE);
	x->request->caching.hit = NULL;
}

/*
 * True if the fetch of x must go on without x's client: it is stored, or may
 * still be, and has followers or is half complete; or it is a refresh.  With
 * `apart`, true if it may move to a slot of its own, with x as one of its
 * followers: not if x might then get less than before, as the rest could not be
 * requested again, and may lack room.
 */
static bool
cache_wants(const struct exchange *x, bool apart)
{
	const struct fetch *f = x->request->caching.fetch;
	bool stores = cache_stores(x);

	if (x->refresh && x->record.end == END_DONE)
		return !apart && (stores || answer_is_stored(x->request));
	if (f == NULL || !x->up.done || (x->phase >= PHASE_RELAY && !stores))
		return false;
	if (f->followers == 0)
		return !apart && stores && f->length != UINT64_MAX &&
		    f->stored >= f->length / 2;
	return !apart ||
	    (stores && !x->refresh &&
		(f->validator != 0 || f->length != UINT64_MAX) &&
		follow_is_safe(f));
}

/*
 * Turns the stored response r into the client's response: 304 if the client
 * has it already, a part of it (r->part is 1), 416 if it has no such part (-1),
 * or all (0).  Returns where in the file a part begins, else 0.
 */
static uint64_t
cache_shape(const struct exchange *x, struct response *r)
{
	const struct request *q = x->request;
	struct range range = { 0, q->body };
	int stored = r->status;
	size_t i;

	/* A refresh has no client that would read the body. */
	r->framing = q->method == METHOD_HEAD || x->refresh ? FRAMING_NO_BODY :
	    q->body == UINT64_MAX                           ? FRAMING_CLOSE :
							      FRAMING_LENGTH;
	if (q->answerer == ANSWER_ENTRY && q->method == METHOD_GET)
		r->part = range_parse(&q->head, r, q->body, &range);
	if (r->status / 100 == 2 && request_is_satisfied(&q->head, r)) {
		r->status = 304;
		r->part = 0;
		/* RFC 9110 section 15.4.5: what the client knows. */
		for (i = 0; *fields_of_body[i] != '\0'; i++)
			(void)head_drop(&r->head, fields_of_body[i], NULL);
	} else if (r->part == -1) {
		r->status = 416;
		/* The fields are about what is not sent, also its freshness. */
		r->head.n = 0;
		range.length = 0;
	} else if (r->part == 1) {
		r->status = 206;
		(void)head_drop(&r->head, "Content-Range", NULL);
	}
	if (r->status != stored)
		r->reason = text_of(status_reason(r->status));
	if (r->status == 304 || r->status == 416)
		r->framing = FRAMING_NO_BODY;
	r->first = range.first;
	r->length = range.length;
	return r->part == 1 ? q->caching.region + r->first : 0;
}

/* Appends Cache-Status (RFC 9211): how the cache was used, or why not. */
static void
cache_status_append(const struct exchange *x, struct buffer *b)
{
	const struct request *q = x->request;
	const struct caching *c = &q->caching;
	bool cached = answer_is_stored(q);
	/* One that waited may have asked the server nevertheless. */
	bool collapsed = c->collapsed && c->state == CACHING_HIT;
	bool hit = cached && c->state == CACHING_HIT && !collapsed;

	buffer_word(b, "Cache-Status: ");
	buffer_word(b, pseudonym);
	if (hit)
		buffer_word(b, "; hit");
	else
		buffer_print(b, "; fwd=%s",
		    c->forward != NULL ? c->forward :
			q->method == METHOD_GET || q->method == METHOD_HEAD ?
					 "bypass" :
					 "method");
	if (c->forward_status)
		buffer_print(b, "; fwd-status=%d", c->forward_status);
	if (cached) {
		buffer_word(b, c->ttl < 0 ? "; ttl=-" : "; ttl=");
		buffer_number(b, (uint64_t)(c->ttl < 0 ? -c->ttl : c->ttl));
	}
	if (cached && collapsed)
		buffer_word(b, "; collapsed");
	if (cache_stores(x))
		buffer_word(b, "; stored");
	buffer_word(b, "\r\n");
}

/*
 * Appends what the cache adds to a head.  To that of a request, if r is NULL:
 * the validators of the entry to validate.  To that of a response r: what an
 * entry that answers has to say, see cache_shape(), and Cache-Status; own: bits
 * of fields that are not added.
 */
static void
cache_fields_append(const struct exchange *x, const struct response *r,
    unsigned own, struct buffer *b)
{
	const struct request *q = x->request;
	unsigned long long body = q->body, first = r ? r->first : 0;

	if (r == NULL) {
		validators_append(x, b);
		return;
	}
	if (answer_is_stored(q) && !(own & OWN_AGE))
		number_append(b, "Age", (uint64_t)q->caching.age);
	if (r->part == 1)
		buffer_print(b, "Content-Range: bytes %llu-%llu/%llu\r\n",
		    first, first + r->length - 1, body);
	else if (r->part == -1)
		buffer_print(b, "Content-Range: bytes */%llu\r\n", body);
	if (answer_is_stored(q) && r->status != 204 && r->status != 304 &&
	    q->body != UINT64_MAX)
		number_append(b, "Content-Length", r->length);
	if (options.cache != NULL && !(own & OWN_CACHE_STATUS))
		cache_status_append(x, b);
}

/* ---- 18. Names ---- */

/*
 * Finds the addresses of names.  getaddrinfo(3) may take a minute, and the
 * loop must never wait for it.  A helper process, forked before any socket is
 * open, forks one short-lived child for each question, so that a slow name
 * delays only the requests that need it.  Questions and answers are records of
 * at most _POSIX_PIPE_BUF bytes on two pipes: a write completes or fails.
 *
 * Door: names, names_ask, names_find, names_lost, names_start, names_take,
 * user_become, user_find.
 */

enum {
	/* Size of the table: a power of two, so that tickets may wrap. */
	NAMES_MAX = 256,
	/* Validity: getaddrinfo(3) tells no TTL. */
	NAME_KEPT_MS = 60000,
	NAME_FAILED_MS = 5000,
	/* Most children of the helper at once. */
	QUESTIONS_MAX = 32,
	/* A child that hangs in the system's resolver ends after this. */
	QUESTION_S = 60,
	QUESTION_MS = 61000,
	/* After this it gives way, if there are more questions. */
	QUESTION_HANGS_US = 3000000,
	/* The helper reaps children at least this often. */
	REAP_MS = 1000
};

/*
 * A question to the helper.  Its ticket is unique, so that a late answer to an
 * older question is ignored; modulo NAMES_MAX it is the place in the table.
 */
struct question {
	unsigned ticket;
	char host[HOST_MAX + 1]; /* the name */
};

/* The answer to a question. */
struct answer {
	unsigned ticket;                    /* of the question */
	int error;                          /* of getaddrinfo(3) */
	unsigned n;                         /* number of addresses */
	struct address list[ADDRESSES_MAX]; /* in the order to try them */
};

/* The state of a name's lookup; a free slot is an answer that is too old. */
enum name_state {
	NAME_KNOWN,  /* the answer is here: addresses or an error */
	NAME_WANTED, /* the question waits to be sent */
	NAME_ASKED   /* the question was sent */
};

/* A name in the table. */
struct name {
	struct question question; /* with the name as the client wrote it */
	struct answer answer;     /* if it is known */
	enum name_state state;    /* of its lookup */
	int64_t until;            /* ms: end of validity */
};

/* A child of the helper. */
struct child {
	pid_t pid;       /* 0: this slot is free */
	unsigned ticket; /* of its question */
	int64_t began;   /* us: the clock when it was forked */
};

/* The names, and the helper. */
static struct {
	struct name table[NAMES_MAX]; /* in no order */
	struct conn questions;        /* to the helper */
	struct conn answers;          /* from it */
	pid_t helper;                 /* its process */
	unsigned tickets;             /* questions so far, times NAMES_MAX */
	int64_t restart; /* ms: when the helper may be started again */
} names;

/*
 * Copies up to ADDRESSES_MAX addresses into the answer.  The families
 * alternate, the system's preferred one first (RFC 8305 section 4).
 */
static void
answer_fill(struct answer *answer, const struct addrinfo *found)
{
	const struct addrinfo *turn[2] = { found, found };
	int first = found->ai_family;
	unsigned other = 0;

	for (; answer->n < ADDRESSES_MAX && (turn[0] || turn[1]); other ^= 1) {
		const struct addrinfo *at = turn[other];

		while (at != NULL && (at->ai_family != first) != other)
			at = at->ai_next;
		if (at != NULL)
			answer->list[answer->n++] = address_import(at->ai_addr);
		turn[other] = at != NULL ? at->ai_next : NULL;
	}
}

/*
 * Writes the answer to a question: the addresses found, or the error, if that
 * is not 0.  It fails only if the proxy has ended.
 */
static void
answer_write(int fd, unsigned ticket, int error, const struct addrinfo *found)
{
	struct answer answer = { .ticket = ticket, .error = error };

	if (error == 0)
		answer_fill(&answer, found);
	(void)fd_write(fd, &answer, sizeof(answer));
}

/* The child: asks the system, and exits with 0 after its answer. */
static void
child_run(const struct question *question, int answers)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *found = NULL;
	int error;

	(void)alarm(QUESTION_S);
	error = getaddrinfo(question->host, NULL, &hints, &found);
	answer_write(answers, question->ticket, error, found);
	_exit(0);
}

/*
 * Reaps ended children, and answers in place of those that failed to.  True if
 * others are running.
 */
static bool
children_reap(struct child *children, int answers)
{
	struct child *child;
	bool some = false;
	int status;

	for (child = children; child < children + QUESTIONS_MAX; child++) {
		if (child->pid == 0)
			continue;
		if (waitpid(child->pid, &status, WNOHANG) != child->pid) {
			some = true;
			continue;
		}
		child->pid = 0;
		if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
			answer_write(answers, child->ticket, EAI_AGAIN, NULL);
	}
	return some;
}

/*
 * Returns a free slot.  If there is none, that of the oldest child if it hangs,
 * as a dead name server must not delay other names for long; else NULL.
 */
static struct child *
child_slot(struct child *children)
{
	struct child *child, *oldest = children;

	for (child = children; child < children + QUESTIONS_MAX; child++) {
		if (child->pid == 0)
			return child;
		if (child->began < oldest->began)
			oldest = child;
	}
	return clock_us() - oldest->began < QUESTION_HANGS_US ? NULL : oldest;
}

/*
 * Forks a child for a question, in a slot from which one that hangs is removed;
 * if that fails, answers at once.
 */
static void
child_fork(struct child *child, const struct question *question, int questions,
    int answers)
{
	if (child->pid != 0) {
		(void)kill(child->pid, SIGKILL);
		(void)waitpid(child->pid, NULL, 0);
		answer_write(answers, child->ticket, EAI_AGAIN, NULL);
	}
	child->ticket = question->ticket;
	child->began = clock_us();
	child->pid = fork();
	if (child->pid == 0) {
		/* An open copy would hide the helper's death. */
		(void)close(questions);
		(void)signal(SIGCHLD, SIG_DFL);
		child_run(question, answers);
	}
	if (child->pid == -1) {
		child->pid = 0;
		answer_write(answers, child->ticket, EAI_AGAIN, NULL);
	}
}

/* The helper's handler of SIGCHLD: it interrupts poll(2). */
static void
child_ended(int number)
{
	(void)number;
}

/* The helper: ends when the other end of `questions` is closed. */
static void
helper_run(int questions, int answers)
{
	static const int ignored[] = { SIGINT, SIGTERM, SIGHUP, SIGUSR1,
		SIGPIPE };
	static struct child children[QUESTIONS_MAX];
	struct pollfd pollfd = { .fd = questions };
	struct question question;
	size_t i;

	for (i = 0; i < sizeof(ignored) / sizeof(ignored[0]); i++)
		(void)signal(ignored[i], SIG_IGN);
	for (;;) {
		/* The timeout is for a child that ends just before poll(2). */
		bool some = children_reap(children, answers);
		struct child *child = child_slot(children);

		/* Each time: systems may reset a handler when it runs. */
		(void)signal(SIGCHLD, child_ended);
		/* Without a slot, questions wait, but the end does not. */
		pollfd.events = child != NULL ? POLLIN : 0;
		if (poll(&pollfd, 1, some ? REAP_MS : -1) <= 0)
			continue;
		if (pollfd.revents != POLLIN ||
		    fd_read(questions, &question, sizeof(question)) !=
			(ssize_t)sizeof(question))
			break;
		child_fork(child, &question, questions, answers);
	}
	/* Those that hang would keep our standard output open. */
	for (i = 0; i < QUESTIONS_MAX; i++)
		if (children[i].pid != 0)
			(void)kill(children[i].pid, SIGKILL);
	_exit(0);
}

/* Finds the user of -u, by name or number, before other processes start. */
static void
user_find(const char *name)
{
	uint64_t number = 0;
	bool numeric = number_parse(text_of(name), INT32_MAX, &number);
	const struct passwd *entry = numeric ? getpwuid((uid_t)number) :
					       getpwnam(name);

	if (entry == NULL && !numeric)
		die("-u %s: no such user", name);
	options.uid = entry != NULL ? entry->pw_uid : (uid_t)number;
	options.gid = entry != NULL ? entry->pw_gid : (gid_t)number;
}

/* Becomes the user of -u, giving up all privileges of root. */
static void
user_become(void)
{
	if (setgroups(0, NULL) == -1 || setgid(options.gid) == -1 ||
	    setuid(options.uid) == -1)
		die("can't become user %s: %s", options.user, strerror(errno));
	if (options.uid != 0 && setuid(0) != -1)
		die("can't give up root for user %s", options.user);
}

/* Starts the helper, or a new one; false, with errno, on failure. */
static bool
names_start(void)
{
	int down[2] = { -1, -1 }, up[2];
	bool good;

	assert(sizeof(struct question) <= _POSIX_PIPE_BUF &&
	    sizeof(struct answer) <= _POSIX_PIPE_BUF);
	if (!pipe_open(down) || !pipe_open(up)) {
		fd_drop(&down[0]);
		fd_drop(&down[1]);
		return false;
	}
	names.helper = fork();
	if (names.helper == 0) {
		fds_close(down[0], up[1]);
		if (options.user != NULL && geteuid() == 0)
			user_become();
		helper_run(down[0], up[1]);
	}
	(void)close(down[0]);
	(void)close(up[1]);
	good = conn_open(&names.questions, ROLE_OWN, down[1], NULL);
	good = conn_open(&names.answers, ROLE_OWN, up[0], NULL) && good;
	if (good && names.helper != -1)
		return true;
	conn_close(&names.questions, false);
	conn_close(&names.answers, false);
	return false;
}

/* Sends the waiting questions; those that do not fit keep waiting. */
static void
names_ask(void)
{
	struct name *name = names.table, *end = name + NAMES_MAX;

	for (; name < end; name++) {
		if (name->state != NAME_WANTED)
			continue;
		names.tickets += NAMES_MAX;
		name->question.ticket =
		    names.tickets + (unsigned)(name - names.table);
		if (fd_write(names.questions.fd, &name->question,
			sizeof(name->question)) == -1)
			break;
		name->state = NAME_ASKED;
		totals.lookups++;
	}
	conn_watch(&names.questions, name < end ? POLLOUT : 0);
}

/* Closes a dead helper; the next, started soon, gets its open questions. */
static void
names_lost(void)
{
	unsigned i;

	conn_close(&names.questions, false);
	conn_close(&names.answers, false);
	while (waitpid(names.helper, NULL, 0) == -1 && errno == EINTR)
		continue;
	for (i = 0; i < NAMES_MAX; i++)
		if (names.table[i].state == NAME_ASKED)
			names.table[i].state = NAME_WANTED;
	names.restart = now.ms + 1000;
	warn("the helper for names died; another is started");
}

/* Takes the answers that have come; false if none is of use. */
static bool
names_take(void)
{
	struct answer answer;
	struct name *name;
	bool some = false;
	ssize_t n;

	while ((n = fd_read(names.answers.fd, &answer, sizeof(answer))) ==
	    (ssize_t)sizeof(answer)) {
		assert(answer.n <= ADDRESSES_MAX);
		name = &names.table[answer.ticket % NAMES_MAX];
		if (name->state != NAME_ASKED ||
		    name->question.ticket != answer.ticket)
			continue;
		if (answer.error == 0 && answer.n == 0)
			answer.error = EAI_NONAME;
		name->state = NAME_KNOWN;
		name->answer = answer;
		name->until =
		    now.ms + (answer.error ? NAME_FAILED_MS : NAME_KEPT_MS);
		totals.names_waiting--;
		totals.failed += answer.error != 0;
		some = true;
	}
	if (n == 0)
		names_lost();
	return some;
}

/*
 * Returns the entry of a host; if it is new, its question is asked.  NULL if
 * all entries wait for an answer.
 */
static struct name *
names_find(const char *host)
{
	struct name *name, *best = NULL;

	for (name = names.table; name < names.table + NAMES_MAX; name++) {
		if (name->state != NAME_WANTED && name->until <= now.ms) {
			totals.names_waiting -= name->state == NAME_ASKED;
			name->state = NAME_KNOWN;
		} else if (strcasecmp(name->question.host, host) == 0)
			return name;
		if (name->state == NAME_KNOWN &&
		    (best == NULL || name->until < best->until))
			best = name;
	}
	if (best == NULL)
		return NULL;
	memset(best, 0, sizeof(*best));
	(void)text_copy(text_of(host), best->question.host,
	    sizeof(best->question.host));
	best->state = NAME_WANTED;
	totals.names_waiting++;
	best->until = now.ms + QUESTION_MS;
	names_ask();
	return best;
}

/* ---- 19. Log ---- */

/*
 * The log has one line for each exchange.  No input can split or forge a line.
 * It may not stop the proxy: when it can't be written, this is said once, lines
 * are counted, and serving goes on.
 *
 * Door: file_is_at, glance_take, glances, log_end, log_ends, log_exchange,
 * log_flush, log_lines, log_names_rule, log_note, log_note_name, log_open,
 * log_quotes, log_status, log_wait, refusal_words, result_names,
 * times_between.
 */

enum {
	/* Bytes of each piece of payload that -vv shows. */
	DUMP_MAX = 256,
	/* Exchanges that have ended and are still shown. */
	GLANCES = 50
};

/* Why an exchange ended, and what became of it, in a word. */
static const char log_ends[][8] = {
	[END_DONE] = "done",
	[END_CLIENT] = "client",
	[END_SERVER] = "server",
	[END_IDLE] = "idle",
	[END_RESET] = "reset",
	[END_LIMIT] = "limit",
	[END_RULE] = "rule",
	[END_STOP] = "stop",
};

static const char result_names[][8] = {
	[RESULT_HIT] = "hit",
	[RESULT_MISS] = "miss",
	[RESULT_TUNNEL] = "tunnel",
	[RESULT_LOCAL] = "local",
	[RESULT_REFUSED] = "refused",
	[RESULT_FAILED] = "failed",
};

/* The lines of this turn; it needs no memory from the system. */
static struct buffer log_lines;

/* What the status page shows of an exchange; texts are printable, and cut. */
struct glance {
	uint64_t number;      /* as in the trace */
	int64_t ms;           /* since it began, or until it ended */
	struct address peer;  /* the client */
	uint64_t up, down;    /* payload in bytes */
	struct record record; /* its rule and user may be gone */
	char method[16], target[160], rule[48];
};

/* Those that ended lately. */
static struct {
	struct glance list[GLANCES]; /* the last is (n - 1) % GLANCES */
	uint64_t n;                  /* how many have ended so far */
} glances;

/*
 * A socket of the system's logger, or -1.  syslog(3) would wait for a logger
 * that does not read.
 */
static int
log_connect(void)
{
	static const char *const paths[] = { LOG_SOCKET, "/var/run/log",
		"/var/run/syslog" };
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
	size_t i;

	if (fd == -1 || fcntl(fd, F_SETFL, O_NONBLOCK) == -1)
		return fd;
	for (i = 0; i < sizeof(paths) / sizeof(paths[0]); i++) {
		(void)text_copy(text_of(paths[i]), un.sun_path,
		    sizeof(un.sun_path));
		if (connect(fd, (struct sockaddr *)&un, sizeof(un)) != -1)
			return fd;
	}
	fd_drop(&fd);
	return fd;
}

/* True if fd is still the file at `path`, which may have been moved. */
static bool
file_is_at(int fd, const char *path)
{
	struct stat named, open;

	return fd != -1 && stat(path, &named) != -1 && fstat(fd, &open) != -1 &&
	    named.st_ino == open.st_ino && named.st_dev == open.st_dev;
}

/* Opens the log that options.log names; false, with errno, on failure. */
static bool
log_open(void)
{
	struct stat status;
	int fd = options.command ? STDERR_FILENO : STDOUT_FILENO;

	if (options.log != NULL && strcmp(options.log, "-") == 0)
		fd = STDOUT_FILENO;
	else if (options.log != NULL && strcmp(options.log, "syslog") == 0) {
		logs.syslog = true;
		fd = log_connect();
	} else if (options.log != NULL) {
		/* Perhaps the user of -u could not open it again. */
		if (logs.regular && file_is_at(logs.fd, options.log))
			return true;
		fd = open(options.log,
		    O_WRONLY | O_APPEND | O_CREAT | O_NONBLOCK, 0640);
	}
	/* A logger that is away may come back. */
	if (fd == -1 && !logs.syslog)
		return false;
	/* The rest of a line does not go to another file. */
	if (logs.cut)
		buffer_drop(&log_lines,
		    text_find(buffer_text(&log_lines), '\n') + 1);
	logs.cut = false;
	if (logs.fd > STDERR_FILENO)
		(void)close(logs.fd);
	logs.fd = fd_note(fd);
	logs.regular = fd != -1 && fstat(fd, &status) != -1 &&
	    S_ISREG(status.st_mode);
	return true;
}

/* Counts a line that could not be written; the first is reported. */
static void
log_lose(const char *why)
{
	if (logs.lost == 0)
		warn("the log can't be written, lines are lost: %s", why);
	logs.lost++;
	totals.lines_lost++;
}

/*
 * Sends the line that t begins with to the system's logger, as syslog(3)
 * would, cut if it is longer than a datagram may be.  Returns its length, 0 if
 * the logger does not take it now, -1 if it is away.
 */
static ssize_t
log_send(struct text t)
{
	static char line[BUFFER_SIZE + 128];
	ssize_t sent;
	size_t n;

	t.len = text_find(t, '\n');
	(void)snprintf(line, sizeof(line), "<%d>%s proxy[%ld]: %.*s",
	    (int)(LOG_DAEMON | LOG_INFO), date_now(DATE_SYSLOG), (long)getpid(),
	    (int)t.len, t.at);
	n = strlen(line);
	sent = send(logs.fd, line, n, 0);
	if (sent == -1 && errno != EAGAIN && errno != ENOBUFS &&
	    errno != EMSGSIZE && log_open() && logs.fd != -1)
		sent = send(logs.fd, line, n, 0);
	while (sent == -1 && errno == EMSGSIZE && (n /= 2) > 0)
		sent = send(logs.fd, line, n, 0);
	if (sent == -1)
		return errno == EAGAIN || errno == ENOBUFS ? 0 : -1;
	return (ssize_t)t.len + 1;
}

/*
 * The part of t for one write to a pipe: whole lines, PIPE_BUF bytes at most,
 * so that lines of other workers do not mix with it.  A longer line goes in
 * pieces.
 */
static struct text
log_piece(struct text t)
{
	size_t n = 0, end;

	while ((end = n + text_find(text_from(t, n), '\n') + 1) <= t.len &&
	    end <= PIPE_BUF)
		n = end;
	if (n == 0)
		n = t.len < PIPE_BUF ? t.len : PIPE_BUF;
	return text_cut(t.at, n);
}

/*
 * Writes a piece of the log.  Returns its length, 0 if it would block now, -1
 * with errno if it fails.
 */
static ssize_t
log_write_some(struct text t)
{
	ssize_t written;

	if (logs.syslog)
		return log_send(t);
	if (!logs.regular) {
		if (!fd_is_ready(logs.fd, POLLOUT))
			return 0;
		t = log_piece(t);
	}
	written = fd_write(logs.fd, t.at, t.len);
	return written == -1 && errno == EAGAIN ? 0 : written;
}

/*
 * Writes the lines of this turn: many lines cost one system call.  If the disk
 * becomes full within a line, the rest of that waits, so that the next line
 * does not follow its beginning.
 */
static void
log_flush(void)
{
	struct buffer *b = &log_lines;
	struct text rest;
	ssize_t n = 1;

	while (buffer_len(b) > 0 && (n = log_write_some(buffer_text(b))) > 0) {
		buffer_drop(b, (size_t)n);
		logs.cut = logs.regular && b->data[b->start - 1] != '\n';
		if (logs.lost > 0)
			warn("the log is written again, %llu lines were lost",
			    (unsigned long long)logs.lost);
		logs.lost = 0;
	}
	rest = n == -1 ? buffer_text(b) : text_of("");
	if (logs.cut)
		(void)line_next(&rest, NULL);
	for (b->end -= rest.len; rest.len > 0; (void)line_next(&rest, NULL))
		log_lose(strerror(errno));
	if (buffer_len(b) == 0)
		b->start = b->end = CHUNK_ROOM;
}

/* Appends the name of a field, and a number, or "-" if that is negative. */
static void
log_number(struct buffer *b, const char *name, int64_t n)
{
	buffer_word(b, name);
	if (n < 0)
		buffer_word(b, "-");
	else
		buffer_number(b, (uint64_t)n);
}

/* Appends the name of a field, and t, which may be anything. */
static void
log_text(struct buffer *b, const char *name, struct text t, size_t max)
{
	buffer_word(b, name);
	buffer_escape(b, t, max, false);
}

/* Appends the name of a field, and a word, which needs no escapes. */
static void
log_word(struct buffer *b, const char *name, const char *word)
{
	buffer_word(b, name);
	buffer_word(b, word);
}

/* The parts of a log line that come from a request, or from a tunnel's note. */
struct quotes {
	struct text name, uri, agent, referer; /* as the client sent them */
	unsigned minor;                        /* of its HTTP/1.x */
	int64_t dns_ms, connect_ms, first_ms;  /* -1: it did not happen */
};

/* The milliseconds between two steps; -1 if one of them did not happen. */
static int64_t
times_between(int64_t from, int64_t to)
{
	return from == 0 || to < from ? -1 : to - from;
}

/* Slices of the request of x, or of its note, for the log. */
static struct quotes
log_quotes(const struct exchange *x)
{
	const struct request *q = x->request;
	const struct note *n = &x->note;
	struct quotes quotes = { .first_ms = -1 };
	struct text login;

	if (q != NULL) {
		const struct times *t = &q->times;

		quotes.name = q->name;
		quotes.uri = q->uri;
		quotes.agent = head_value(&q->head, "User-Agent");
		quotes.referer = head_value(&q->head, "Referer");
		login = url_login(quotes.referer);
		if (login.len > 0)
			quotes.referer = text_from(quotes.referer,
			    (size_t)(login.at - quotes.referer.at) + login.len);
		quotes.minor = q->minor;
		quotes.dns_ms = times_between(t->asked, t->resolved);
		quotes.connect_ms = q->route.reused ?
		    -1 :
		    times_between(t->resolved, t->connected);
		if (q->answerer != ANSWER_MEMORY && q->answerer != ANSWER_ENTRY)
			quotes.first_ms =
			    times_between(t->connected, t->answered);
		return quotes;
	}
	quotes.name = text_cut(n->text, n->name);
	quotes.uri = text_cut(n->text + n->name, n->uri);
	quotes.agent = text_cut(quotes.uri.at + n->uri, n->agent);
	quotes.referer = text_cut(quotes.agent.at + n->agent, n->referer);
	quotes.minor = n->minor;
	quotes.dns_ms = n->dns_ms;
	quotes.connect_ms = n->connect_ms;
	return quotes;
}

/*
 * Keeps the texts of x that the log needs, cut to fit, for when x has no
 * request.
 */
static void
log_note(struct exchange *x)
{
	struct quotes quotes = log_quotes(x);
	struct note *n = &x->note;
	const struct text *const texts[] = { &quotes.name, &quotes.uri,
		&quotes.agent, &quotes.referer };
	unsigned char *const lens[] = { &n->name, &n->uri, &n->agent,
		&n->referer };
	size_t used = 0, i;

	for (i = 0; i < sizeof(lens) / sizeof(lens[0]); i++) {
		size_t room = NOTE_MAX - NOTE_SNI - used;
		size_t len = texts[i]->len < room ? texts[i]->len : room;

		memcpy(n->text + used, texts[i]->at, len);
		*lens[i] = (unsigned char)len;
		used += len;
	}
	n->minor = (unsigned char)quotes.minor;
	n->dns_ms = (int32_t)quotes.dns_ms;
	n->connect_ms = (int32_t)quotes.connect_ms;
	n->sni_len = 0;
}

/* Keeps the name in a tunnel's greeting for the log, cut to its room. */
static void
log_note_name(struct exchange *x, struct text name)
{
	struct note *n = &x->note;
	struct text host = text_cut(n->text + n->name, n->uri);

	host.len = text_find(host, ':');
	if (name.len == 0)
		return;
	if (text_same(name, host))
		n->sni = n->name;
	else {
		n->sni = NOTE_MAX - NOTE_SNI;
		if (name.len > NOTE_SNI)
			name.len = NOTE_SNI;
		memcpy(n->text + n->sni, name.at, name.len);
	}
	n->sni_len = (unsigned char)name.len;
}

/* Appends the request line as it was sent. */
static void
log_request(struct buffer *b, const struct quotes *q)
{
	if (q->name.len > 0) {
		buffer_escape(b, q->name, BUFFER_ROOM / 16, false);
		buffer_word(b, " ");
	}
	buffer_escape(b, q->uri, (size_t)BUFFER_ROOM / 8 * 3, true);
	if (q->name.len > 0)
		buffer_word(b, q->minor ? " HTTP/1.1" : " HTTP/1.0");
}

/*
 * The status of an exchange.  As in nginx, 499 means that the client left
 * before an answer, 444 that it was dropped.
 */
static int
log_status(const struct record *r)
{
	return r->status ? r->status : r->end == END_RULE ? 444 : 499;
}

/* True if the rule that decided is the user's, or a built-in that refused. */
static bool
log_names_rule(const struct record *r)
{
	return r->rule != NULL &&
	    !(r->rule->built_in && r->rule->action == ACTION_ALLOW);
}

/*
 * Why x was refused, in words; *status becomes the status for that, if status
 * is not NULL.  A rule may have its own of both.
 */
static const char *
refusal_words(const struct exchange *x, int *status)
{
	enum refusal refusal = x->record.refusal;
	const struct rule *rule = x->record.rule;
	bool ruled = (refusal == REFUSE_RULE || refusal == REFUSE_GUARDED) &&
	    rule != NULL && rule->status != 0;

	if (status != NULL)
		*status = ruled ? rule->status : refusals[refusal].status;
	return ruled && rule->words.len > 0 ? rule->words.at :
					      refusals[refusal].words;
}

/*
 * Appends the line of x to b, in the Combined Log Format, followed by fields
 * of our own.  The longest line fits into an empty buffer: method and target
 * take less than 4/8 of it, the texts that come from clients 1/8 each, all else
 * less than 2 KiB.
 */
static void
log_line(const struct exchange *x, const struct quotes *quotes,
    struct buffer *b)
{
	const struct request *q = x->request;
	const struct record *r = &x->record;
	const struct note *n = &x->note;

	buffer_word(b, address_host(&x->peer));
	log_text(b, " - ", r->user ? r->user->user : text_of(""),
	    CREDENTIAL_MAX);
	log_word(b, " [", date_now(DATE_LOG));
	buffer_word(b, "] \"");
	log_request(b, quotes);
	log_number(b, "\" ", log_status(r));
	log_number(b, " ", (int64_t)x->down.payload);
	log_text(b, " \"", quotes->referer, BUFFER_ROOM / 8);
	log_text(b, "\" \"", quotes->agent, BUFFER_ROOM / 8);
	buffer_word(b, "\"");
	if (q != NULL && q->caching.hit != NULL)
		log_word(b, " hit=", q->caching.hit);
	else if (q != NULL && q->caching.miss != NULL)
		log_word(b, " miss=", q->caching.miss);
	log_number(b, " up=", (int64_t)x->up.payload);
	log_number(b, " dns=", quotes->dns_ms);
	log_number(b, " connect=", quotes->connect_ms);
	log_number(b, " first=", quotes->first_ms);
	log_number(b, " total=", now.ms - r->start);
	log_word(b, " server=", address_words(&r->server));
	log_word(b, " end=", log_ends[r->end]);
	if (n->sni_len > 0)
		log_text(b, " sni=", text_cut(n->text + n->sni, n->sni_len),
		    NOTE_MAX);
	if (log_names_rule(r))
		log_text(b, " rule=", text_of(r->rule->where), RULE_NAME_MAX);
	if (x->bend != NULL)
		log_text(b, " bent=", text_of(x->bend->rules),
		    sizeof(x->bend->rules));
	if (r->refusal) {
		buffer_word(b, " why=\"");
		buffer_escape(b, text_of(refusal_words(x, NULL)),
		    (size_t)2 * REASON_MAX, true);
		buffer_word(b, "\"");
	}
	buffer_word(b, "\n");
}

/* Fills g with what the status page shows of x. */
static void
glance_take(const struct exchange *x, const struct quotes *quotes,
    struct glance *g)
{
	const struct record *r = &x->record;

	g->number = x->number;
	g->ms = now.ms - (r->start ? r->start : x->since);
	g->peer = x->peer;
	g->record = *r;
	g->up = x->up.payload;
	g->down = x->down.payload;
	(void)text_printable(quotes->name, g->method, sizeof(g->method));
	(void)text_printable(quotes->uri, g->target, sizeof(g->target));
	(void)text_printable(text_of(log_names_rule(r) ? r->rule->where : ""),
	    g->rule, sizeof(g->rule));
}

/* What became of x, which has ended. */
static enum result
log_result(const struct exchange *x)
{
	enum cause cause = refusals[x->record.refusal].cause;
	const struct request *q = x->request;

	if (x->record.refusal != REFUSE_NONE)
		return cause != CAUSE_RULE &&
			refusals[x->record.refusal].status >= 500 ?
		    RESULT_FAILED :
		    RESULT_REFUSED;
	if (x->tunnel)
		return RESULT_TUNNEL;
	if (x->record.end != END_DONE)
		return RESULT_FAILED;
	if (q == NULL)
		return RESULT_MISS;
	return answer_is_stored(q)       ? RESULT_HIT :
	    q->answerer == ANSWER_MEMORY ? RESULT_LOCAL :
					   RESULT_MISS;
}

/* Counts a response whose first byte is about to go to the client. */
static void
log_wait(const struct exchange *x)
{
	int64_t ms = now.ms - x->record.start;
	size_t i = 0;

	while (i < WAITS && ms > waits_ms[i])
		i++;
	totals.waits[i]++;
	totals.waited_ms += (uint64_t)ms;
}

/*
 * Counts an exchange that has ended, and adds its line to those of this turn,
 * which are written if they leave no room for it.
 */
static void
log_exchange(const struct exchange *x)
{
	struct quotes quotes = log_quotes(x);
	struct buffer *b = &log_lines;
	unsigned tries;

	totals.results[log_result(x)]++;
	totals.refusals[x->record.refusal]++;
	totals.up += x->up.payload;
	totals.down += x->down.payload;
	glance_take(x, &quotes, &glances.list[glances.n++ % GLANCES]);
	for (tries = 0; tries < 2; tries++) {
		size_t end = b->end;

		log_line(x, &quotes, b);
		if (b->overflow == 0)
			return;
		b->end = end;
		b->overflow = 0;
		log_flush();
		buffer_compact(b);
	}
	log_lose("its reader is too slow");
}

/* At the end of the program: reports lost lines, and those still unwritten. */
static void
log_end(void)
{
	struct text rest;

	log_flush();
	for (rest = buffer_text(&log_lines); rest.len > 0; logs.lost++)
		(void)line_next(&rest, NULL);
	if (logs.lost > 0)
		warn("%llu lines of the log were lost",
		    (unsigned long long)logs.lost);
}

/* ---- 20. Recording: HAR 1.2 ---- */

/*
 * With -w, an entry for each exchange.  What the entry needs of heads and
 * bodies is kept in a file without a name until the exchange ends, and memory
 * is taken once, at the start.
 *
 * Door: record_exchange, record_open, record_tables, secret_fields,
 * secret_masked, tape_add, tape_cut.
 */

enum {
	/* Bytes that are kept of a body, and of each part of a tape. */
	RECORD_MAX = 1 << 20,
	/*
	 * The longest entry.  Text may have twice its length here, base64 4/3;
	 * bytes of a head and of a URL six times theirs, and 32 more for each
	 * field or parameter.
	 */
	RECORD_ROOM = 4 * RECORD_MAX + 24 * BUFFER_SIZE + 2 * 32 * FIELDS_MAX
};

/*
 * What is kept of an exchange until it ends: a file without a name, in which
 * part i begins at i * RECORD_MAX.  It stays open for the slot's next exchange.
 */
struct tape {
	int fd;                     /* -1: not needed so far */
	bool lost;                  /* something could not be kept */
	int64_t sent;               /* ms: the last of the request was read */
	uint64_t sizes[TAPE_PARTS]; /* bytes that have passed */
};

static struct {
	int fd;             /* the file, or -1: nothing is recorded */
	off_t end;          /* where the next entry begins */
	bool first;         /* it is the first one */
	bool failed;        /* it can't be written, which has been said */
	struct tape *tapes; /* one for each slot */
	char *at;           /* the entry that is being made */
	size_t n;           /* its length; RECORD_ROOM: it is too long */
	char *head, *body;  /* RECORD_MAX bytes each, read from a tape */
} recording = { .fd = -1 };

static const char record_end[] = "\n]}}\n";

/* Fields whose values neither the trace nor the recording shows. */
static const char secret_fields[][LISTED_NAME] = { "Authorization",
	"Proxy-Authorization", "" };

/* t with stars for the logins in its URLs; valid until the next call. */
static struct text
secret_masked(struct text t)
{
	static struct buffer copy;

	buffer_append(buffer_clear(&copy), t);
	secret_hide(copy.data + copy.start, buffer_len(&copy), "/?# \t\"<>");
	return buffer_text(&copy);
}

/*
 * Where the next entry begins in a recording, which may be an empty file; -1
 * if the file is something else.
 */
static off_t
record_find_end(int fd)
{
	static const char empty[] =
	    "{\"log\":{\"version\":\"1.2\",\"creator\":{\"name\":\"proxy\","
	    "\"version\":\"" VERSION "\"},\"entries\":[\n]}}\n";
	char last[sizeof(record_end)];
	off_t end = lseek(fd, 0, SEEK_END);

	if (end == 0)
		end = fd_write_at(fd, empty, strlen(empty), 0);
	end -= (off_t)strlen(record_end);
	if (end <= 0 ||
	    pread(fd, last, sizeof(last), end - 1) != (ssize_t)sizeof(last) ||
	    memcmp(last + 1, record_end, strlen(record_end)) != 0)
		return -1;
	recording.first = last[0] == '[';
	return end;
}

/*
 * Opens the file of -w, unless it is open and has not moved.  Returns why it
 * can't be used, or NULL.
 */
static const char *
record_open(void)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	const char *why = NULL;
	off_t end = -1;
	int fd;

	if (file_is_at(recording.fd, options.record))
		return NULL;
	fd = open(options.record, O_RDWR | O_CREAT, 0600);
	if (fd == -1)
		return strerror(errno);
	if (fcntl(fd, F_SETLK, &lock) == -1)
		why = "another process writes it";
	else if ((end = record_find_end(fd)) == -1)
		why = "it does not end as a recording does";
	fd_drop(why ? &fd : &recording.fd);
	if (why != NULL)
		return why;
	recording.fd = fd_note(fd);
	recording.end = end;
	recording.failed = false;
	return NULL;
}

/* Takes memory for entries, and a tape for each slot; false without memory. */
static bool
record_tables(void)
{
	size_t i;

	recording.tapes = calloc(exchanges.n, sizeof(*recording.tapes));
	recording.at = malloc(RECORD_ROOM + 2 * RECORD_MAX);
	if (recording.tapes == NULL || recording.at == NULL)
		return false;
	recording.head = recording.at + RECORD_ROOM;
	recording.body = recording.head + RECORD_MAX;
	for (i = 0; i < exchanges.n; i++)
		recording.tapes[i].fd = -1;
	return true;
}

/* Says once that something can't be recorded. */
static void
record_fail(const char *why)
{
	if (!recording.failed)
		warn("%s can't be written, exchanges are missing in it: %s",
		    options.record, why);
	recording.failed = true;
}

/* Opens a tape beside the recording; false, with errno, if that fails. */
static bool
tape_open(struct tape *t)
{
	char path[CACHE_PATH];

	if (t->fd != -1)
		return true;
	if (snprintf(path, sizeof(path), "%s.XXXXXX", options.record) >=
	    (int)sizeof(path))
		return false;
	t->fd = fd_note(mkstemp(path));
	if (t->fd != -1)
		(void)unlink(path);
	return t->fd != -1;
}

/* How many bytes of a part are on the tape. */
static size_t
tape_len(const struct tape *t, enum tape_part part)
{
	return t->lost ? 0 : (size_t)least((int64_t)t->sizes[part], RECORD_MAX);
}

/*
 * Keeps a piece of a part of x, if there is a recording.  A head replaces an
 * earlier one.
 */
static void
tape_add(const struct exchange *x, enum tape_part part, struct text piece)
{
	struct tape *t =
	    recording.fd == -1 ? NULL : &recording.tapes[x - exchanges.slots];
	size_t len;

	/* A fetch that was moved to a slot of its own has no entry. */
	if (t == NULL || x->record.start == 0)
		return;
	if (part == TAPE_REQUEST_HEAD || part == TAPE_RESPONSE_HEAD)
		t->sizes[part] = 0;
	if (part == TAPE_REQUEST_HEAD || part == TAPE_REQUEST_BODY)
		t->sent = now.ms;
	len = tape_len(t, part);
	t->sizes[part] += piece.len;
	if (piece.len > RECORD_MAX - len)
		piece.len = RECORD_MAX - len;
	if (piece.len == 0 || t->lost)
		return;
	errno = ENOSPC; /* if a write is short */
	if (!tape_open(t) ||
	    fd_write_at(t->fd, piece.at, piece.len,
		(off_t)part * RECORD_MAX + (off_t)len) != (ssize_t)piece.len) {
		record_fail(strerror(errno));
		t->lost = true;
	}
}

/* Forgets the part of the response's body that the client has not got. */
static void
tape_cut(const struct exchange *x)
{
	uint64_t *size = recording.fd == -1 ?
	    NULL :
	    &recording.tapes[x - exchanges.slots].sizes[TAPE_RESPONSE_BODY];

	if (size != NULL && *size > x->down.payload)
		*size = x->down.payload;
}

/* Reads a part of a tape into memory that is for heads, or for bodies. */
static struct text
tape_read(const struct tape *t, enum tape_part part, char *to)
{
	ssize_t n =
	    pread(t->fd, to, tape_len(t, part), (off_t)part * RECORD_MAX);

	return text_cut(to, n > 0 ? (size_t)n : 0);
}

/*
 * The length of the character in UTF-8 (RFC 3629 section 4) that t begins
 * with; 0 if there is no whole one, or it is a control character.
 */
static size_t
utf8_length(struct text t)
{
	unsigned char c = (unsigned char)*t.at, next;
	unsigned char low = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
	unsigned char high = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
	size_t n = c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4, i;

	if (t.len < n || (c < 32 && !is_among((char)c, "\t\n\r")) ||
	    (c >= 0x7f && c < 0xc2) || c > 0xf4)
		return 0;
	for (i = 1; i < n; i++) {
		next = (unsigned char)t.at[i];
		if (next < low || next > high)
			return 0;
		low = 0x80;
		high = 0xbf;
	}
	return n;
}

/* How many bytes at the start of t are whole characters in UTF-8. */
static size_t
utf8_span(struct text t)
{
	size_t whole = 0, n = 1;

	for (; whole < t.len && n > 0; whole += n)
		n = utf8_length(text_from(t, whole));
	return whole;
}

/* Appends t to the entry. */
static void
record_append(struct text t)
{
	if (t.len >= RECORD_ROOM - recording.n) {
		recording.n = RECORD_ROOM;
		return;
	}
	memcpy(recording.at + recording.n, t.at, t.len);
	recording.n += t.len;
}

/*
 * Appends t as the inside of a JSON string (RFC 8259 section 7).  Bytes over
 * 127 stay if t is UTF-8; in heads they stand for ISO-8859-1.
 */
static void
record_escape(struct text t, bool utf8)
{
	static const char named[] = "\"\\\t\n\r", letters[] = "\"\\tnr";
	char name[2] = "\\", code[6] = "\\u00";

	for (; t.len > 0; t = text_from(t, 1)) {
		unsigned char c = (unsigned char)*t.at;

		if (is_among(*t.at, named)) {
			name[1] = letters[strchr(named, c) - named];
			record_append(text_cut(name, sizeof(name)));
		} else if (c < 32 || (c > 126 && !utf8)) {
			(void)hex_print(code + 4, c, 2);
			record_append(text_cut(code, sizeof(code)));
		} else
			record_append(text_cut(t.at, 1));
	}
}

/*
 * Appends JSON.  In the format, ' stands for ", $ for a text as a string, # for
 * a number (int64_t), and all else for itself.  A comma at its start is left
 * out behind [, in front of the first element of a list.
 */
static void
record_json(const char *format, ...)
{
	char digits[NUMBER_DIGITS + 2];
	va_list args;

	if (*format == ',' && recording.at[recording.n - 1] == '[')
		format++;
	va_start(args, format);
	for (; *format != '\0'; format++)
		if (*format == '$') {
			record_append(text_of("\""));
			record_escape(va_arg(args, struct text), false);
			record_append(text_of("\""));
		} else if (*format == '#') {
			(void)snprintf(digits, sizeof(digits), "%lld",
			    (long long)va_arg(args, int64_t));
			record_append(text_of(digits));
		} else
			record_append(
			    text_cut(*format == '\'' ? "\"" : format, 1));
	va_end(args);
}

/* Takes the next field of a head; false at its end.  Secrets are hidden. */
static bool
record_field_next(struct text *head, struct text *name, struct text *value)
{
	struct text line = line_next(head, NULL);

	if (line.len == 0)
		return false;
	*name = text_trim(text_split(&line, ':'));
	*value = name_is_among(*name, secret_fields) ? text_of("***") :
						       text_trim(line);
	return true;
}

/* The value of a field of a head, of which the first line is gone, or "". */
static struct text
record_field(struct text head, const char *wanted)
{
	struct text name, value;

	while (record_field_next(&head, &name, &value))
		if (text_is(name, wanted))
			return value;
	return text_of("");
}

/* Appends the fields of a head, and sizes. */
static void
record_head(const struct tape *t, enum tape_part part, enum tape_part body,
    struct text head)
{
	struct text name, value;

	record_json(",'cookies':[],'headers':[");
	while (record_field_next(&head, &name, &value))
		record_json(",{'name':$,'value':$}", name,
		    secret_masked(value));
	record_json("],'headersSize':#,'bodySize':#", t->sizes[part],
	    t->sizes[body]);
}

/*
 * Appends the type of a body, as its head names it, and what was kept of it:
 * text as text, the rest in base64.  A body that was cut may end within a
 * character.
 */
static void
record_body(const struct tape *t, enum tape_part part, struct text head)
{
	struct text coding = record_field(head, "Content-Encoding");
	struct text body = tape_read(t, part, recording.body);
	bool cut = t->sizes[part] > RECORD_MAX, text;
	size_t whole = utf8_span(body);

	text = coding.len == 0 &&
	    (whole == body.len || (cut && body.len - whole < 4));
	record_json("'mimeType':$,'text':'",
	    record_field(head, "Content-Type"));
	if (text)
		record_escape(text_cut(body.at, whole), true);
	else if (body.len * 2 < RECORD_ROOM - recording.n) {
		base64_encode(body.at, body.len, recording.at + recording.n);
		recording.n += (body.len + 2) / 3 * 4;
	} else
		recording.n = RECORD_ROOM;
	record_json("'");
	if (!text && body.len > 0)
		record_json(part == TAPE_REQUEST_BODY ?
			",'_encoding':'base64'" :
			",'encoding':'base64'");
	if (coding.len > 0)
		record_json(",'_contentEncoding':$", coding);
	if (t->lost || cut)
		record_json(",'comment':$",
		    text_of(t->lost ? "could not be kept" :
				      "cut: longer than 1048576 bytes"));
}

/* Appends the parameters of a URL, as they are in it. */
static void
record_query(struct text url)
{
	record_json(",'queryString':[");
	url = text_split(&url, '#');
	(void)text_split(&url, '?');
	while (url.len > 0) {
		struct text pair = text_split(&url, '&');
		struct text name = text_split(&pair, '=');

		record_json(",{'name':$,'value':$}", name, pair);
	}
	record_json("]");
}

/*
 * Appends the request that the tape has; the URL in a tunnel's note is cut.
 * Its URL is always absolute, because readers of HAR refuse any other.
 */
static void
record_request(const struct exchange *x, const struct tape *t,
    const struct quotes *quotes)
{
	struct text head = tape_read(t, TAPE_REQUEST_HEAD, recording.head);
	struct text line = line_next(&head, NULL), url = quotes->uri;
	static struct buffer escaped;

	record_json("'request':{'method':$,'httpVersion':$,'url':'",
	    quotes->name, text_of(quotes->minor ? "HTTP/1.1" : "HTTP/1.0"));
	if (x->tunnel && !t->lost) {
		(void)text_split(&line, ' ');
		url = text_split(&line, ' ');
	}
	if (quotes->name.len == 0) {
		record_append(text_of("invalid:"));
		buffer_escape(buffer_clear(&escaped), url, BUFFER_ROOM / 2,
		    false);
		url = buffer_text(&escaped);
	} else if (text_is(quotes->name, "CONNECT"))
		record_append(text_of("connect://"));
	else if (text_starts(url, "/") || text_is(url, "*")) {
		record_append(text_of("http://"));
		buffer_escape(buffer_clear(&escaped),
		    record_field(head, "Host"), BUFFER_ROOM / 2, false);
		record_escape(buffer_text(&escaped), false);
		/* That of `*' has no path, RFC 9112 section 3.3. */
		url = text_from(url, *url.at == '*');
	}
	record_escape(url, false);
	record_json("'");
	record_query(url);
	record_head(t, TAPE_REQUEST_HEAD, TAPE_REQUEST_BODY, head);
	if (t->sizes[TAPE_REQUEST_BODY] > 0) {
		record_json(",'postData':{");
		record_body(t, TAPE_REQUEST_BODY, head);
		record_json("}");
	}
	record_json("}");
}

/* Appends the response that the client of x had, if any. */
static void
record_response(const struct exchange *x, const struct tape *t)
{
	struct text head = tape_read(t, TAPE_RESPONSE_HEAD, recording.head);
	struct text line = line_next(&head, NULL);
	struct text version = text_split(&line, ' ');

	(void)text_split(&line, ' ');
	record_json(",'response':{'status':#,'statusText':$,'httpVersion':$,"
		    "'redirectURL':$",
	    (int64_t)log_status(&x->record), line, version,
	    secret_masked(record_field(head, "Location")));
	record_head(t, TAPE_RESPONSE_HEAD, TAPE_RESPONSE_BODY, head);
	record_json(",'content':{'size':#,", t->sizes[TAPE_RESPONSE_BODY]);
	record_body(t, TAPE_RESPONSE_BODY, head);
	record_json("}}");
}

/*
 * Appends the times of x in milliseconds, as in the log.  The time before a
 * server was asked is `blocked`.  If no server answered, the whole time except
 * for dns and connect is `wait`; for a tunnel it is `receive`.
 */
static void
record_times(const struct exchange *x, const struct tape *t,
    const struct quotes *quotes)
{
	int64_t total = now.ms - x->record.start, send = 0, wait, receive = 0;
	int64_t blocked = -1;
	int64_t left = total - (quotes->dns_ms > 0 ? quotes->dns_ms : 0) -
	    (quotes->connect_ms > 0 ? quotes->connect_ms : 0);

	wait = left > 0 ? left : 0;
	if (x->request != NULL && quotes->first_ms >= 0) {
		const struct times *times = &x->request->times;

		receive = now.ms - times->answered;
		send = times_between(times->connected, t->sent);
		send = send < 0 ? 0 : least(send, quotes->first_ms);
		wait = quotes->first_ms - send;
		left -= quotes->first_ms + receive;
		blocked = left < 0 ? -1 : left;
	} else if (x->tunnel) {
		receive = wait;
		wait = 0;
	}
	record_json(",'time':#,'timings':{'blocked':#,'dns':#,'connect':#,"
		    "'send':#,'wait':#,'receive':#}",
	    total, blocked, quotes->dns_ms, quotes->connect_ms, send, wait,
	    receive);
}

/* Appends when x began, in RFC 3339's form, who took part, and its end. */
static void
record_frame(const struct exchange *x)
{
	char date[40] = "";
	char comment[RULE_NAME_MAX + REASON_MAX + 64];
	const struct record *r = &x->record;
	bool ruled = log_names_rule(r);
	struct text words;
	struct timespec wall = { 0, 0 };
	int64_t began;
	time_t seconds;
	struct tm parts;
	size_t n = 0;

	(void)clock_gettime(CLOCK_REALTIME, &wall);
	began = (int64_t)wall.tv_sec * 1000 + wall.tv_nsec / 1000000 -
	    (now.ms - r->start);
	seconds = (time_t)(began / 1000);
	if (gmtime_r(&seconds, &parts) != NULL)
		n = strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%S", &parts);
	(void)snprintf(date + n, sizeof(date) - n, ".%03dZ",
	    (int)(began % 1000));
	record_json("'startedDateTime':$,'cache':{},'connection':$,",
	    text_of(date), text_of(address_words(&x->peer)));
	if (r->server.family != 0)
		record_json("'serverIPAddress':$,",
		    text_of(address_host(&r->server)));
	(void)snprintf(comment, sizeof(comment), "end=%s%s%s%s%s",
	    log_ends[r->end], ruled ? ", rule " : "",
	    ruled ? r->rule->where : "", r->refusal ? ", " : "",
	    r->refusal ? refusal_words(x, NULL) : "");
	words = text_of(comment);
	record_json("'comment':'");
	record_escape(words, utf8_span(words) == words.len);
	record_json("',");
}

/*
 * Adds x, which has ended, to the recording, if there is one.  A single write
 * overwrites the closing brackets with the new entry and writes the brackets
 * again behind it, so the file is valid JSON even if the proxy is killed
 * between two entries.  If the write fails, the file becomes what it was
 * before.
 */
static void
record_exchange(const struct exchange *x)
{
	struct quotes quotes = log_quotes(x);
	struct tape *t;

	if (recording.fd == -1)
		return;
	t = &recording.tapes[x - exchanges.slots];
	tape_cut(x);
	recording.n = 0;
	record_append(text_of(recording.first ? "\n{" : ",\n{"));
	record_frame(x);
	record_request(x, t, &quotes);
	record_response(x, t);
	record_times(x, t, &quotes);
	record_json("}");
	record_append(text_of(record_end));
	errno = ENOSPC; /* if the write is short */
	if (recording.n == RECORD_ROOM)
		record_fail("an entry is too long");
	else if (fd_write_at(recording.fd, recording.at, recording.n,
		     recording.end) == (ssize_t)recording.n) {
		recording.end += (off_t)(recording.n - strlen(record_end));
		recording.first = false;
	} else {
		record_fail(strerror(errno));
		if (ftruncate(recording.fd, recording.end) != -1)
			(void)fd_write_at(recording.fd, record_end,
			    strlen(record_end), recording.end);
	}
	if (t->fd != -1 && ftruncate(t->fd, 0) == -1)
		record_fail(strerror(errno));
	memset(t->sizes, 0, sizeof(t->sizes));
	t->lost = false;
}

/* ---- 21. Trace ---- */

/*
 * With -v, a line for each step and each field of a head, on standard error;
 * with -vv the payload too.  For the log and the trace of a tunnel, the name of
 * its server is read from the TLS greeting.
 *
 * Door: hello_is_whole, hello_name, trace_change, trace_dump, trace_end,
 * trace_head, trace_mended.
 */

/*
 * The last line of an exchange in the trace: what ended it, and why it was
 * refused.  On a terminal, a blank line follows.
 */
static void
trace_end(const struct exchange *x)
{
	static const char blank = '\n';
	const struct record *r = &x->record;

	if (!is_traced(x))
		return;
	trace(x, "ended: %s, %d, %llu bytes up, %llu down%s%s",
	    log_ends[r->end], log_status(r), (unsigned long long)x->up.payload,
	    (unsigned long long)x->down.payload, r->refusal ? ", " : "",
	    r->refusal ? refusal_words(x, NULL) : "");
	if (logs.colour)
		say(&blank, 1);
}

/* The name of the field that a line of a head is, or should be. */
static struct text
line_name(struct text line)
{
	return text_trim(text_split(&line, ':'));
}

/*
 * Traces a line of a head.  mark gives its direction: "c>" from the client,
 * ">s" to the server, "s>" from the server, ">c" to the client; sign what
 * became of it; reason why, or "".  Of a secret only the name is shown.
 */
static void
trace_field(const struct exchange *x, const char *mark, const char *sign,
    struct text line, const char *reason)
{
	enum colour colour = mark[0] == 'c' || mark[1] == 's' ? COLOUR_REQUEST :
								COLOUR_RESPONSE;
	struct text name = line_name(line);
	bool hidden = name_is_among(name, secret_fields);
	char prefix[8], tail[100];

	(void)snprintf(prefix, sizeof(prefix), "%s %s", mark, sign);
	(void)snprintf(tail, sizeof(tail), "%s%s%s%s", hidden ? ": ***" : "",
	    *reason ? "  (" : "", reason, *reason ? ")" : "");
	trace_line(x, colour, prefix, hidden ? name : secret_masked(line),
	    tail);
}

/* Traces a head, or what came in its place, line by line. */
static void
trace_head(const struct exchange *x, const char *mark, struct text head)
{
	struct text line;

	while (is_traced(x) && (line = line_next(&head, NULL)).len > 0)
		trace_field(x, mark, "", line, "");
}

/* Why the proxy drops a field, or adds one ("": the same): the RFCs. */
static const struct {
	char name[26], dropped[42], added[42];
} trace_reasons[] = {
	{ "Age", "the age now, RFC 9111 5.1", "" },
	{ "Cache-Status", "", "by the cache, RFC 9211" },
	{ "Connection", "hop-by-hop, RFC 9110 7.6.1",
	    "about this connection, RFC 9112 9.6" },
	{ "Content-Length", "framed anew, RFC 9112 6.3",
	    "framed anew, RFC 9112 6.2" },
	{ "Content-Range", "", "a part of the entry, RFC 9110 14.4" },
	{ "Date", "", "the response had none, RFC 9110 6.6.1" },
	{ "Expect", "not of HTTP/1.0, RFC 9110 10.1.1", "" },
	{ "HTTP2-Settings", "hop-by-hop, RFC 7540 3.2.1", "" },
	{ "Host", "the URL decides, RFC 9112 3.2.2", "" },
	{ "If-Modified-Since", "the entry's goes first, RFC 9111 4.3.1",
	    "validator of the entry, RFC 9111 4.3.1" },
	{ "If-None-Match", "the entry's goes first, RFC 9111 4.3.1",
	    "validator of the entry, RFC 9111 4.3.1" },
	{ "Keep-Alive", "hop-by-hop, RFC 9110 7.6.1", "" },
	{ "Max-Forwards", "one hop less, RFC 9110 7.6.2", "" },
	{ "Proxy-Authenticate", "not of this hop, RFC 9110 11.7.1", "" },
	{ "Proxy-Authentication-Info", "not of this hop, RFC 9110 11.7.3", "" },
	{ "Proxy-Authorization", "for this proxy, RFC 9110 11.7.2",
	    "the login at the parent, RFC 9110 11.7.2" },
	{ "Proxy-Connection", "hop-by-hop, RFC 9110 7.6.1", "" },
	{ "TE", "hop-by-hop, RFC 9110 10.1.4", "" },
	{ "Trailer", "the trailer may not pass, RFC 9110 6.6.2", "" },
	{ "Transfer-Encoding", "of one connection, RFC 9112 6.1",
	    "the length is not known, RFC 9112 7.1" },
	{ "Upgrade", "hop-by-hop, RFC 9110 7.8", "RFC 9110 7.8" },
	{ "Via", "", "who passed it on, RFC 9110 7.6.3" },
};

/*
 * Says in words why a field of that name was dropped from a head, or added:
 * a rule, or what the RFCs say; "" if nothing is known.  Valid until the next
 * call.
 */
static const char *
trace_reason(const struct exchange *x, const struct head *from,
    const struct response *r, struct text name, bool added)
{
	const struct rule *rule = rules_rewriter(x, r, name);
	static char words[80];
	size_t i;

	if (rule != NULL) {
		(void)snprintf(words, sizeof(words), "rule %s", rule->where);
		return words;
	}
	for (i = 0; i < sizeof(trace_reasons) / sizeof(trace_reasons[0]); i++)
		if (text_is(name, trace_reasons[i].name))
			return added && trace_reasons[i].added[0] != '\0' ?
			    trace_reasons[i].added :
			    trace_reasons[i].dropped;
	if (!added && head_lists(from, "Connection", name))
		return "named in Connection, RFC 9110 7.6.1";
	if (!added && text_is(name, "Accept-Encoding"))
		return options.record ? "it is recorded as text (-w)" :
					"a rule looks for a text in the body";
	return "";
}

/* The line of field i of h as it came. */
static struct text
field_line(const struct head *h, size_t i)
{
	struct text name = field_name(h, i), value = field_value(h, i);

	return text_cut(name.at, (size_t)(value.at - name.at) + value.len);
}

/* True if a line of another head is field i of h. */
static bool
line_is(struct text line, const struct head *h, size_t i)
{
	struct text name = text_split(&line, ':');

	return text_same(name, field_name(h, i)) &&
	    text_equals(text_trim(line), field_value(h, i));
}

/* True if one of the lines of another head is field i of h. */
static bool
trace_has(struct text head, const struct head *h, size_t i)
{
	struct text line;

	while ((line = line_next(&head, NULL)).len > 0)
		if (line_is(line, h, i))
			return true;
	return false;
}

/*
 * Traces the head of a request, or of r, that leaves, and what became of the
 * one that came: `-' before a line that was dropped, `+' before one that was
 * added, and why.
 */
static void
trace_change(const struct exchange *x, const char *mark,
    const struct response *r, struct text to)
{
	const struct head *from = r ? &r->head : &x->request->head;
	struct text rest = to, line = line_next(&rest, NULL);
	size_t i;

	if (!is_traced(x))
		return;
	if (!text_equals(line, from->line)) {
		trace_field(x, mark, "- ", from->line, "");
		trace_field(x, mark, "+ ", line,
		    r == NULL ? "the form for the next hop, RFC 9112 3.2" :
			r->status == 304 || r->status == 206 ?
				"what the client asked for, RFC 9110 13, 14" :
				"our version, RFC 9110 6.2");
	} else
		trace_field(x, mark, "", line, "");
	for (i = 0; i < from->n; i++)
		if (!trace_has(to, from, i))
			trace_field(x, mark, "- ", field_line(from, i),
			    trace_reason(x, from, r, field_name(from, i),
				false));
	while ((line = line_next(&rest, NULL)).len > 0) {
		for (i = 0; i < from->n && !line_is(line, from, i);)
			i++;
		if (i < from->n)
			trace_field(x, mark, "", line, "");
		else
			trace_field(x, mark, "+ ", line,
			    trace_reason(x, from, r, line_name(line), true));
	}
}

/* Tells the trace what was put right in a server's head. */
static void
trace_mended(const struct exchange *x, unsigned mended)
{
	static const char *const words[MENDS] = {
		"LF alone ended a line: taken as CR LF",
		"blanks before a colon: removed",
		"a line without a colon: dropped",
		"Transfer-Encoding: identity: ignored",
		"Content-Length beside Transfer-Encoding: dropped",
		"Transfer-Encoding in HTTP/1.0: not stored, RFC 9112 6.1",
	};
	unsigned i;

	for (i = 0; i < MENDS; i++)
		if (mended >> i & 1)
			trace(x, "the server's head: %s", words[i]);
}

/* Traces at most DUMP_MAX bytes in hex and ASCII, 16 bytes a line. */
static void
trace_dump(const struct exchange *x, const char *mark, struct text t)
{
	char text[] = "0000  .. .. .. .. .. .. .. .. .. .. .. .. .. .. .. ..  ";
	size_t at, i;

	trace(x, "%s %lu bytes", mark, (unsigned long)t.len);
	for (at = 0; at < t.len && at < DUMP_MAX; at += 16) {
		struct text row = text_from(t, at);

		if (row.len > 16)
			row.len = 16;
		(void)hex_print(text, at, 4);
		for (i = 0; i < 16; i++)
			if (i < row.len)
				(void)hex_print(text + 6 + 3 * i,
				    (unsigned char)row.at[i], 2);
			else
				memset(text + 6 + 3 * i, ' ', 2);
		trace_line(x, COLOUR_DIM, text, row, "");
	}
}

/* ---- the server name in a TLS ClientHello, for the log ---- */

enum {
	/* Bytes of a ClientHello that are read: clients send at most 2 KiB. */
	HELLO_MAX = 4096
};

/* A part of a TLS message, read from its front. */
struct cursor {
	struct text rest; /* not read yet */
	bool bad;         /* bytes were missing; sticky */
};

/* Takes a number of n bytes, highest first; 0 if they are missing. */
static size_t
cursor_number(struct cursor *c, size_t n)
{
	size_t value = 0;

	c->bad = c->bad || c->rest.len < n;
	for (; n > 0 && !c->bad; n--) {
		value = value << 8 | (unsigned char)*c->rest.at;
		c->rest = text_from(c->rest, 1);
	}
	return c->bad ? 0 : value;
}

/*
 * Takes a vector, which has its length in n bytes in front of it (RFC 8446
 * section 3.4).  Of a truncated vector, takes all bytes that are there.
 */
static struct cursor
cursor_vector(struct cursor *c, size_t n)
{
	struct cursor part = { .rest = c->rest };
	size_t len = cursor_number(c, n);

	part.bad = c->bad;
	part.rest = text_cut(c->rest.at, len < c->rest.len ? len : c->rest.len);
	c->rest = text_from(c->rest, part.rest.len);
	return part;
}

/*
 * Copies the handshake message in the records at the start of t (RFC 8446
 * section 5.1) to `to`, of HELLO_MAX bytes.  Empty if t is no handshake.
 */
static struct text
hello_gather(struct text t, char *to)
{
	struct cursor c = { .rest = t };
	size_t n = 0;

	/* Type 22, version 3.x. */
	while (cursor_number(&c, 2) == 0x1603 && n < HELLO_MAX) {
		struct text piece;

		(void)cursor_number(&c, 1);
		piece = cursor_vector(&c, 2).rest;
		if (piece.len > HELLO_MAX - n)
			piece.len = HELLO_MAX - n;
		memcpy(to + n, piece.at, piece.len);
		n += piece.len;
	}
	return text_cut(to, n);
}

/* The extensions of the ClientHello t (RFC 8446 section 4.1.2). */
static struct cursor
hello_extensions(struct text t)
{
	struct cursor c = { .rest = t };

	c.bad = cursor_number(&c, 1) != 1;
	c = cursor_vector(&c, 3);
	(void)cursor_number(&c, 2);  /* version */
	(void)cursor_number(&c, 32); /* random */
	(void)cursor_vector(&c, 1);  /* session */
	(void)cursor_vector(&c, 2);  /* ciphers */
	(void)cursor_vector(&c, 1);  /* compression */
	return cursor_vector(&c, 2);
}

/*
 * The server name (RFC 6066 section 3) in the TLS ClientHello at the start of
 * t, a client's first bytes.  A slice of `flat`, of HELLO_MAX bytes; empty if
 * there is none.  It is the first of its list: no other type is defined.
 */
static struct text
hello_name(struct text t, char *flat)
{
	struct cursor c = hello_extensions(hello_gather(t, flat));

	while (!c.bad && c.rest.len > 0) {
		size_t type = cursor_number(&c, 2), len;
		struct cursor list = cursor_vector(&c, 2);

		if (type != 0)
			continue;
		list = cursor_vector(&list, 2);
		type = cursor_number(&list, 1);
		len = cursor_number(&list, 2);
		t = text_cut(list.rest.at, len);
		if (type == 0 && len <= list.rest.len &&
		    host_is_valid(t, false) && text_find(t, '~') == t.len)
			return t;
	}
	return text_cut(flat, 0);
}

/* True if all of a TLS greeting is there, or it is too long. */
static bool
hello_is_whole(struct text t, char *flat)
{
	struct cursor c = { hello_gather(t, flat), false };
	size_t len;

	(void)cursor_number(&c, 1);
	len = cursor_number(&c, 3);
	return t.len >= HELLO_MAX || (!c.bad && len <= c.rest.len);
}

/* ---- 22. Heads and pages: what the proxy writes ---- */

/*
 * Everything that the proxy writes itself: the request head for the next hop,
 * the response head for the client, the handshake with a SOCKS5 parent, and
 * its own pages.  All of it is built in a buffer here; the phases of an
 * exchange decide when to send it, and to whom.
 *
 * Door: exchange_append, exchange_is_relayed, exchange_waits, greet_append,
 * greet_length, greet_words, page_find, page_is_ours, page_options, page_own,
 * page_refusal, page_rule, page_trace, phases, request_build, response_build,
 * totals_show.
 */

/* ---- the head for the server ---- */

/* True if the next hop is an HTTP parent. */
static bool
exchange_is_relayed(const struct exchange *x)
{
	const struct parent *parent = exchange_parent(x);

	return parent != NULL && parent->kind == PARENT_HTTP;
}

/*
 * Appends the request line and Host, both built from the target alone; an
 * HTTP parent gets the whole target.
 */
static void
request_line_append(const struct exchange *x, struct buffer *b)
{
	const struct request *q = x->request;
	struct text path = q->target.path;
	bool connect = q->method == METHOD_CONNECT;
	bool relayed = exchange_is_relayed(x);
	char target[HOST_MAX + 10];

	authority_print(q->target.host, q->target.port, connect, target);
	buffer_append(b, q->name);
	buffer_word(b, relayed && !connect ? " http://" : " ");
	if (relayed || connect)
		buffer_word(b, target);
	if (q->method == METHOD_OPTIONS && path.len == 0)
		buffer_word(b, relayed ? "" : "*");
	else if (!connect && (path.len == 0 || *path.at == '?'))
		buffer_word(b, "/");
	buffer_append(b, path);
	buffer_word(b, " HTTP/1.1\r\nHost: ");
	buffer_word(b, target);
	buffer_word(b, "\r\n");
}

/*
 * Appends the login for an HTTP parent: the configured one, or else the
 * client's, unless the client sent it to log in here.
 */
static void
login_append(const struct exchange *x, struct buffer *b)
{
	const struct parent *parent = exchange_parent(x);
	const struct head *h = &x->request->head;
	size_t own = field_find(h, "Proxy-Authorization", 0);
	char plain[2 * CREDENTIAL_MAX + 2];
	char coded[4 * (sizeof(plain) + 2) / 3 + 1];
	int n;

	if (parent->login) {
		n = snprintf(plain, sizeof(plain), "%s:%s", parent->user,
		    parent->password);
		base64_encode(plain, (size_t)n, coded);
		buffer_print(b, "Proxy-Authorization: Basic %s\r\n", coded);
	} else if (own < h->n && !x->rules->logins)
		field_append(b, h, own);
}

/* Appends field i of the request, unless it must not be passed on. */
static void
request_field_append(struct exchange *x, size_t i, struct buffer *b)
{
	const struct request *q = x->request;
	const struct head *h = &q->head;
	struct text name = field_name(h, i);
	uint64_t hops;

	if (text_is(name, "Content-Length")) {
		if (i == field_find(h, "Content-Length", 0) &&
		    q->method != METHOD_CONNECT)
			number_append(b, "Content-Length", q->length);
	} else if (text_is(name, "Max-Forwards") &&
	    (q->method == METHOD_TRACE || q->method == METHOD_OPTIONS)) {
		if (number_clamp(field_value(h, i), UINT64_MAX, &hops) &&
		    hops > 0)
			number_append(b, "Max-Forwards", hops - 1);
	} else if (field_passes(h, i) && !mark_is_set(&q->rewrites.taken, i) &&
	    !(q->minor == 0 && text_is(name, "Expect")) &&
	    !(q->caching.state == CACHING_VALIDATES &&
		name_is_among(name, fields_of_condition)))
		field_append(b, h, i);
}

/* Appends Connection and the fields that it names: TE and Upgrade. */
static void
connection_append(const struct request *q, struct buffer *b)
{
	bool trailers = q->minor == 1 && q->method != METHOD_CONNECT &&
	    head_lists(&q->head, "TE", text_of("trailers"));
	size_t i;

	if (trailers)
		buffer_word(b, "TE: trailers\r\n");
	for (i = 0; i < q->head.n && q->upgrade; i++)
		if (text_is(field_name(&q->head, i), "Upgrade"))
			field_append(b, &q->head, i);
	if (trailers || q->upgrade)
		buffer_print(b, "Connection: %s%s%s\r\n", trailers ? "TE" : "",
		    trailers && q->upgrade ? ", " : "",
		    q->upgrade ? "upgrade" : "");
}

/*
 * Appends the whole request head for the next hop to b.  To drop a field, name
 * it in fields_of_hop[], so that no client, server or rule writes it, in
 * trace_reasons[], and under Rewriting in the manual.  To add a field of our
 * own, do the same and append it here, unless options.anonymous is set.
 */
static void
request_build(struct exchange *x, struct buffer *b)
{
	const struct request *q = x->request;
	size_t i;

	request_line_append(x, b);
	for (i = 0; i < q->head.n; i++)
		request_field_append(x, i, b);
	if (x->up.to == FRAMING_CHUNKED)
		buffer_word(b, "Transfer-Encoding: chunked\r\n");
	if (exchange_is_relayed(x))
		login_append(x, b);
	cache_fields_append(x, NULL, 0, b);
	for (i = 0; i < q->rewrites.n; i++)
		line_append(b, q->rewrites.fields[i]->name,
		    q->rewrites.fields[i]->value);
	x->up.strips = q->rewrites.strips || q->head.nominates_late;
	if (!(q->rewrites.own & OWN_VIA))
		via_append(b, q->minor);
	connection_append(q, b);
	buffer_word(b, "\r\n");
}

/* ---- the head for the client ---- */

/* Appends field i of the response, unless it must not be passed on. */
static void
response_field_append(const struct exchange *x, const struct response *r,
    size_t i, struct buffer *b)
{
	const struct request *q = x->request;
	struct text name = field_name(&r->head, i);
	uint64_t length;

	if (answer_is_stored(q) && text_is(name, "Age"))
		return;
	if (text_is(name, "Content-Length")) {
		length = response_length(r);
		if (i == field_find(&r->head, "Content-Length", 0) &&
		    length != UINT64_MAX && r->status >= 200 &&
		    r->status != 204 &&
		    (q->method != METHOD_CONNECT || r->status >= 300))
			number_append(b, "Content-Length", length);
	} else if (field_passes(&r->head, i) ||
	    (r->status == 407 && text_is(name, "Proxy-Authenticate")))
		field_append(b, &r->head, i);
}

/* Appends the response head for the client to b. */
static void
response_build(struct exchange *x, const struct response *r, struct buffer *b)
{
	const struct request *q = x->request;
	bool upgrade = r->status == 101 || r->status == 426;
	bool tunnel = q->method == METHOD_CONNECT && r->status < 300;
	bool final = r->status >= 200 && !tunnel;
	bool ours = q->answerer == ANSWER_MEMORY &&
	    (x->bend == NULL || !x->bend->answers);
	struct rewrites w = { .n = 0 };
	size_t i;

	if (!ours)
		rules_rewrite(x, r, &w);
	if (!final)
		w.own |= OWN_DATE | OWN_CACHE_STATUS;
	x->down.strips = w.strips || r->head.nominates_late;
	status_append(b, 1, r->status, r->reason);
	for (i = 0; i < r->head.n; i++)
		if (upgrade && text_is(field_name(&r->head, i), "Upgrade"))
			field_append(b, &r->head, i);
		else if (!mark_is_set(&w.taken, i))
			response_field_append(x, r, i, b);
	for (i = 0; i < w.n; i++)
		line_append(b, w.fields[i]->name, w.fields[i]->value);
	if (!(w.own & OWN_DATE) && !head_has(&r->head, "Date"))
		buffer_print(b, "Date: %s\r\n", date_now(DATE_HTTP));
	if (q->answerer != ANSWER_MEMORY && !(w.own & OWN_VIA))
		via_append(b, r->minor);
	/* Not to a page of the proxy's own (RFC 9211 section 2). */
	if (q->answerer != ANSWER_MEMORY)
		cache_fields_append(x, r, w.own, b);
	if (x->down.to == FRAMING_CHUNKED)
		buffer_word(b, "Transfer-Encoding: chunked\r\n");
	if (upgrade)
		buffer_word(b, "Connection: upgrade\r\n");
	if (final && x->close)
		buffer_word(b, "Connection: close\r\n");
	buffer_word(b, "\r\n");
}

/* ---- the handshake with a SOCKS5 parent (RFC 1928, RFC 1929) ---- */

/* Appends our message for this state of the handshake. */
static void
greet_append(const struct exchange *x, struct buffer *b)
{
	const struct parent *parent = exchange_parent(x);
	const struct target *t = &x->request->target;
	int host_len = (int)t->host.len;
	struct address a;

	assert(parent != NULL);
	switch (x->request->route.greeting) {
	case GREETING_METHOD:
		buffer_append(b,
		    parent->login ? text_cut("\5\2\0\2", 4) :
				    text_cut("\5\1\0", 3));
		break;
	case GREETING_LOGIN:
		/* Each behind its length (RFC 1929 section 2). */
		buffer_print(b, "\1%c%s%c%s", (int)strlen(parent->user),
		    parent->user, (int)strlen(parent->password),
		    parent->password);
		break;
	default:
		/* A name is sent as a name: the parent looks it up. */
		buffer_append(b, text_cut("\5\1\0", 3));
		if (!address_parse(t->host, t->port, &a))
			buffer_print(b, "\3%c%.*s", host_len, host_len,
			    t->host.at);
		else {
			bool six = a.family == AF_INET6;

			buffer_word(b, six ? "\4" : "\1");
			buffer_append(b,
			    text_cut((char *)a.octets, six ? 16 : 4));
		}
		buffer_print(b, "%c%c", (int)(t->port >> 8),
		    (int)(t->port & 255));
	}
}

/*
 * The length of the parent's next message, of which t has arrived.  More than
 * t.len if it is not known yet, 0 if t is not SOCKS5.
 */
static size_t
greet_length(enum greeting greeting, struct text t)
{
	unsigned char type = t.len > 3 ? (unsigned char)t.at[3] : 1;

	if (t.len < 2)
		return 2;
	if (greeting != GREETING_REPLY)
		return t.at[0] == (greeting == GREETING_LOGIN ? 1 : 5) ? 2 : 0;
	if (t.at[0] != 5)
		return 0;
	if (t.at[1] != 0)
		return 2;
	if (t.len < 5)
		return 5;
	return type == 1 ? 10 :
	    type == 4    ? 22 :
	    type == 3    ? 7 + (size_t)(unsigned char)t.at[4] :
			   0;
}

/* The words for a reply code of RFC 1928 section 6. */
static const char *
greet_words(unsigned char code)
{
	static const char words[][30] = { "no error", "it failed",
		"not allowed by its rules", "network unreachable",
		"host unreachable", "connection refused", "TTL expired",
		"it does not know CONNECT", "it does not know this address" };

	return code < sizeof(words) / sizeof(words[0]) ? words[code] :
							 "an unknown reply";
}

/* ---- pages ---- */

enum {
	/* Bytes of a line about an exchange, on the status page. */
	STATUS_LINE = 1200,
	/* In a smaller buffer there is no room for the HELP lines. */
	METRICS_ROOM = 6000
};

/*
 * The proxy's own responses: refusals, its own pages, the answers of rules,
 * and the answers to OPTIONS and TRACE that end here.  Each is a response in
 * memory, except for the file of a rule, and is then handled like any other.
 * Nothing here sends a byte.  Only two answers repeat the text of a request:
 * that to TRACE, and the status page, whose HTML escapes it.  All others repeat
 * at most a host whose characters were checked.
 */

/*
 * Makes x->server a response from memory: status, the lines in `fields`
 * (each ends in CR LF), and body.
 */
static void
page_make(struct exchange *x, int status, const char *type, const char *fields,
    struct text body)
{
	struct conn *s = &x->server;

	conn_close(s, false);
	s->in = buffer_take_reserved();
	s->eof = true;
	answer_by(x, ANSWER_MEMORY);
	if (s->in == NULL)
		return;
	buffer_print(s->in, "HTTP/1.1 %d %s\r\nDate: %s\r\n%s", status,
	    status_reason(status), date_now(DATE_HTTP), fields);
	if (type != NULL)
		buffer_print(s->in, "Content-Type: %s\r\n", type);
	/* Of a 304 it would be that of the 200 (RFC 9110 section 8.6). */
	if (status != 304)
		number_append(s->in, "Content-Length", body.len);
	buffer_word(s->in, "\r\n");
	buffer_append(s->in, body);
}

/*
 * The field that a response with this status must have (RFC 9110 section 15),
 * as a line, or "".  A rule names the status alone, so a 401 asks for the
 * simplest login, a 405 allows no method, and a 426 wants TLS, as in RFC 2817
 * section 4.2.
 */
static const char *
page_duty(int status)
{
	return status == 401 ? "WWW-Authenticate: Basic realm=\"server\", "
			       "charset=\"UTF-8\"\r\n" :
	    status == 405    ? "Allow:\r\n" :
	    status == 407    ? "Proxy-Authenticate: Basic realm=\"proxy\", "
			       "charset=\"UTF-8\"\r\n" :
	    status == 426    ? "Upgrade: TLS/1.2, HTTP/1.1\r\n" :
			       "";
}

/*
 * Refuses x by a page: words, then details.  Proxy-Status (RFC 9209) says the
 * same to programs; its strings contain no quotes or backslashes.
 */
static void
page_refusal(struct exchange *x, enum refusal refusal, const char *detail)
{
	char fields[DETAIL_MAX + 384], body[DETAIL_MAX + REASON_MAX + 64];
	char clean[DETAIL_MAX], *c;
	const char *words;
	int status;

	x->record.refusal = refusal;
	words = refusal_words(x, &status);
	(void)text_printable(text_of(*detail ? detail : words), clean,
	    sizeof(clean));
	for (c = clean; *c != '\0'; c++)
		*c = is_among(*c, "\"\\") ? '\'' : *c;
	(void)snprintf(fields, sizeof(fields),
	    "Proxy-Status: %s; error=%s; details=\"%s\"\r\n"
	    "Cache-Control: no-store\r\n%s%s",
	    pseudonym, refusals[refusal].error, clean,
	    status == 503 ? "Retry-After: 5\r\n" : "",
	    refusal == REFUSE_PAGE_METHOD ? "Allow: GET, HEAD\r\n" :
					    page_duty(status));
	(void)snprintf(body, sizeof(body), "%d %s: %s\n%s%s", status,
	    status_reason(status), words, *detail ? clean : "",
	    *detail ? "\n" : "");
	page_make(x, status, "text/plain; charset=utf-8", fields,
	    text_of(body));
}

/* The name of each phase, and what an exchange waits for in it, or "". */
static const struct {
	char name[9], waits[30];
} phases[PHASES] = {
	[PHASE_FREE] = { "free", "" },
	[PHASE_REQUEST] = { "request", "a request" },
	[PHASE_COLLAPSE] = { "collapse", "what another exchange fetches" },
	[PHASE_RESOLVE] = { "resolve", "an address" },
	[PHASE_CONNECT] = { "connect", "a connection" },
	[PHASE_GREET] = { "greet", "the SOCKS parent" },
	[PHASE_RESPONSE] = { "response", "the head of the response" },
	[PHASE_RELAY] = { "relay", "" },
	[PHASE_LINGER] = { "linger", "the client to close" },
};

/* What an exchange waits for, in words; valid until the next call. */
static const char *
exchange_waits(const struct exchange *x)
{
	static const char sides[][18] = { "client to send", "client to receive",
		"server to send", "server to receive" };
	static char text[120];
	const struct conn *const conns[] = { &x->client, &x->server };
	size_t i, n = 0;

	if (x->phase == PHASE_REQUEST && x->unnamed)
		return "a PROXY header";
	if (x->phase != PHASE_RESPONSE && x->phase != PHASE_RELAY)
		return phases[x->phase].waits;
	if (x->bend != NULL && (x->bend->unanswered || x->bend->until != 0))
		return x->bend->unanswered ? "the client to give up" :
					     "the end of a delay";
	(void)snprintf(text, sizeof(text), " %s",
	    x->request != NULL && x->request->answerer == ANSWER_FETCH ?
		"the fetch that it follows" :
		"its turn");
	if (x->bend != NULL && x->bend->rate != UINT64_MAX &&
	    ((x->up.ready > 0 && x->server.out == NULL) ||
		(x->down.ready > 0 && x->client.out == NULL)))
		n = (size_t)snprintf(text, sizeof(text), " its rate");
	for (i = 0; i < 4; i++) {
		const struct conn *c = conns[i / 2];
		short event = i % 2 ? POLLOUT : POLLIN;

		/* What a client sends now is for its next request. */
		if (i == 0 && !x->tunnel && x->up.done)
			continue;
		if (c->fd != -1 && c->place != 0 &&
		    poll_set.fds[c->place].events & event)
			n += (size_t)snprintf(text + n, sizeof(text) - n,
			    "%s the %s", n ? " or" : "", sides[i]);
	}
	return text + 1;
}

/*
 * Appends a line about an exchange, without the newline: state, when, who and
 * what.  It has at most STATUS_LINE bytes.
 */
static void
glance_append(struct buffer *b, const struct glance *g, const char *state,
    const char *waits)
{
	buffer_print(b, "#%llu %s", (unsigned long long)g->number, state);
	if (waits != NULL)
		buffer_print(b, ", waits for %s,", waits);
	buffer_print(b, " %lld.%03lld s, %s", (long long)g->ms / 1000,
	    (long long)g->ms % 1000, address_words(&g->peer));
	if (g->method[0] != '\0' || g->target[0] != '\0')
		buffer_print(b, " %s %s", g->method, g->target);
	if (g->record.status != 0)
		buffer_print(b, " %d", g->record.status);
	buffer_print(b, ", up %llu, down %llu", (unsigned long long)g->up,
	    (unsigned long long)g->down);
	if (g->record.server.family != 0)
		buffer_print(b, ", server %s",
		    address_words(&g->record.server));
	if (g->rule[0] != '\0')
		buffer_print(b, ", rule %s", g->rule);
	if (g->record.refusal != REFUSE_NONE)
		buffer_print(b, ": %s", refusals[g->record.refusal].words);
}

/*
 * Appends what is known of x, which has not ended: also for how long nothing
 * could be written, who has closed its side, the next hop if that is not the
 * server that the client asked for, and the rules that bend it.
 */
static void
exchange_append(struct buffer *b, const struct exchange *x)
{
	const struct parent *p = x->request != NULL ? x->request->route.parent :
						      NULL;
	struct quotes quotes = log_quotes(x);
	struct glance g;

	glance_take(x, &quotes, &g);
	glance_append(b, &g, phases[x->phase].name, exchange_waits(x));
	if (x->phase == PHASE_RESPONSE || x->phase == PHASE_RELAY)
		buffer_print(b, ", no byte for %lld s",
		    (long long)(now.ms - x->moved) / 1000);
	if (x->client.eof && x->client.fd != -1)
		buffer_word(b, ", the client sends no more");
	if (x->server.eof && x->tunnel)
		buffer_word(b, ", the server sends no more");
	if (p != NULL && p->kind != PARENT_NONE)
		buffer_print(b, ", by %s port %u", p->host, p->port);
	if (x->bend != NULL)
		buffer_print(b, ", bent by %s", x->bend->rules);
}

/* Brings what is in use now up to date, and shows the totals to all workers. */
static void
totals_show(void)
{
	totals.busy = exchanges.busy;
	totals.slots = exchanges.n;
	totals.buffers = buffer_pool.used;
	totals.descriptors = poll_set.all - 1;
	workers[worker].totals = totals;
}

/* The totals of all workers together: each member is a number to be added. */
static struct totals
totals_add(void)
{
	struct totals sum = { .up = 0 };
	uint64_t *to = (uint64_t *)&sum;
	size_t i, n;

	totals_show();
	for (i = 0; i < workers_n; i++)
		for (n = 0; n < sizeof(sum) / sizeof(*to); n++)
			to[n] += ((const uint64_t *)&workers[i].totals)[n];
	return sum;
}

/* Appends the first lines of the status page: the proxy as a whole. */
static void
status_begin(struct buffer *b, const struct totals *t)
{
	unsigned long long hits = t->results[RESULT_HIT];
	unsigned long long asked = hits + t->results[RESULT_MISS];
	long long s = (now.ms - started) / 1000;
	size_t i;

	buffer_print(b, "proxy " VERSION "\n  up %lld d %lld h %lld min %lld s",
	    s / 86400, s / 3600 % 24, s / 60 % 60, s % 60);
	for (i = 0; i < listeners_n; i++)
		buffer_print(b, "\n  listening on %s",
		    listeners[i].path ? listeners[i].path :
					address_words(&listeners[i].address));
	buffer_print(b,
	    "\n  connections %lu of %lu, at most %lu so far\n"
	    "  buffers %lu in use\n  name lookups waiting %u\n",
	    (unsigned long)t->busy, (unsigned long)t->slots,
	    (unsigned long)t->busiest, (unsigned long)t->buffers,
	    (unsigned)t->names_waiting);
	if (options.cache != NULL)
		buffer_print(b,
		    "  cache %llu of %llu KiB, %llu hits of %llu (%llu %%)\n",
		    (unsigned long long)t->stored / 1024,
		    (unsigned long long)options.cache_size / 1024, hits, asked,
		    asked ? hits * 100 / asked : 0);
	for (i = 0; i < RESULTS; i++)
		buffer_print(b, "%s %llu %s", i ? "," : "  exchanges",
		    (unsigned long long)t->results[i], result_names[i]);
	buffer_print(b, "\n  payload up %llu, down %llu bytes\n",
	    (unsigned long long)t->up, (unsigned long long)t->down);
	if (worker > 0)
		buffer_print(b,
		    "  worker %u of %u answers: what follows is its own\n",
		    worker, (unsigned)options.workers);
}

/*
 * Appends the page at /status as text: headings, and lines with two blanks
 * before them.  Exchanges for which there is no room are counted instead; the
 * one that asks is left out.
 */
static void
status_lines(struct buffer *b, const struct exchange *asks)
{
	struct totals sum = totals_add();
	const struct exchange *x;
	const struct glance *g;
	size_t half, left = 0, i;

	status_begin(b, &sum);
	half = buffer_room(b) / 2;
	buffer_word(b, "\nUnder way\n");
	for (x = exchanges.slots; x < exchanges.slots + exchanges.used; x++) {
		if (x->phase == PHASE_FREE || x == asks)
			continue;
		if (buffer_room(b) < half + STATUS_LINE) {
			left++;
			continue;
		}
		buffer_word(b, "  ");
		exchange_append(b, x);
		buffer_word(b, "\n");
	}
	if (left > 0)
		buffer_print(b, "  and %lu more\n", (unsigned long)left);
	buffer_word(b, "\nEnded, the latest first\n");
	for (i = 1; i <= GLANCES && i <= glances.n; i++) {
		if (buffer_room(b) < STATUS_LINE)
			break;
		g = &glances.list[(glances.n - i) % GLANCES];
		buffer_word(b, "  ");
		glance_append(b, g, log_ends[g->record.end], NULL);
		buffer_word(b, "\n");
	}
}

/* Appends t, with the characters escaped that mean something in HTML. */
static void
html_append(struct buffer *b, struct text t)
{
	size_t i;

	for (i = 0; i < t.len; i++)
		buffer_append(b,
		    t.at[i] == '<'     ? text_of("&lt;") :
			t.at[i] == '>' ? text_of("&gt;") :
			t.at[i] == '&' ? text_of("&amp;") :
					 text_cut(t.at + i, 1));
}

/* Appends the same as HTML, for browsers; what has no room is left out. */
static void
status_html(struct buffer *b, const struct exchange *asks)
{
	static struct buffer lines;
	struct text t;

	status_lines(buffer_clear(&lines), asks);
	buffer_append(b,
	    text_of("<!DOCTYPE html><html lang=en><meta charset=utf-8>"
		    "<meta name=viewport content='width=device-width'>"
		    "<meta http-equiv=refresh content=2><title>proxy</title>"
		    "<style>:root{color-scheme:light dark}"
		    "body{font:14px/1.4 system-ui,sans-serif;margin:1em auto;"
		    "padding:0 1em;max-width:60em}"
		    "h2{font-size:1.1em;margin:1.2em 0 .3em}"
		    "p{margin:0;padding:.2em 0;overflow-wrap:anywhere;"
		    "border-bottom:1px solid #8884}</style>\n"));
	for (t = buffer_text(&lines); t.len > 0;) {
		struct text line = text_split(&t, '\n');
		bool row = text_starts(line, "  ");

		if (line.len == 0)
			continue;
		if (buffer_room(b) < 6 * line.len + 64)
			break;
		buffer_word(b, row ? "<p>" : "<h2>");
		html_append(b, text_from(line, row ? 2 : 0));
		buffer_word(b, row ? "</p>\n" : "</h2>\n");
	}
}

/* Appends the head of a metric, in the text format of Prometheus. */
static void
metric_begin(struct buffer *b, const char *name, const char *type,
    const char *help)
{
	if ((int)BUFFER_ROOM >= METRICS_ROOM)
		buffer_print(b, "# HELP proxy_%s %s\n", name, help);
	buffer_print(b, "# TYPE proxy_%s %s\n", name, type);
}

/* Appends a metric that is one number; names of counters end in _total. */
static void
metric_append(struct buffer *b, const char *name, const char *help, uint64_t n)
{
	metric_begin(b, name, strstr(name, "_total") ? "counter" : "gauge",
	    help);
	buffer_print(b, "proxy_%s %llu\n", name, (unsigned long long)n);
}

/* Appends how long clients waited for the first byte, as a histogram. */
static void
metrics_waits(struct buffer *b, const struct totals *t)
{
	static const char name[] = "first_byte_seconds";
	unsigned long long n = 0;
	size_t i;

	metric_begin(b, name, "histogram",
	    "Time until the first byte of a response went to the client.");
	for (i = 0; i < WAITS; i++) {
		n += t->waits[i];
		buffer_print(b, "proxy_%s_bucket{le=\"%d.%03d\"} %llu\n", name,
		    waits_ms[i] / 1000, waits_ms[i] % 1000, n);
	}
	n += t->waits[WAITS];
	buffer_print(b,
	    "proxy_%s_bucket{le=\"+Inf\"} %llu\n"
	    "proxy_%s_sum %llu.%03llu\nproxy_%s_count %llu\n",
	    name, n, name, (unsigned long long)t->waited_ms / 1000,
	    (unsigned long long)t->waited_ms % 1000, name, n);
}

/* Appends the refusals, summed up by their words in Proxy-Status (RFC 9209). */
static void
metrics_refusals(struct buffer *b, const struct totals *t)
{
	size_t i, j, first = 0;
	uint64_t denials = 0, n;

	metric_begin(b, "refusals_total", "counter",
	    "Exchanges that the proxy refused or that failed, by the error "
	    "in Proxy-Status.");
	for (i = REFUSE_NONE + 1; i < REFUSALS; i++) {
		const char *error = refusals[i].error;

		if (refusals[i].cause == CAUSE_RULE)
			denials += t->refusals[i];
		for (n = 0, j = REFUSALS - 1; j != REFUSE_NONE; j--)
			if (strcmp(refusals[j].error, error) == 0) {
				n += t->refusals[j];
				first = j;
			}
		if (i == first)
			buffer_print(b,
			    "proxy_refusals_total{error=\"%s\"} %llu\n", error,
			    (unsigned long long)n);
	}
	metric_append(b, "denials_total", "Exchanges that a rule refused.",
	    denials);
}

/* Appends the page at /metrics, for monitors. */
static void
metrics_append(struct buffer *b, const struct exchange *asks)
{
	static const char sides[][7] = { "client", "server" };
	struct totals sum = totals_add(), *t = &sum;
	size_t i;

	(void)asks;
	metric_begin(b, "build_info", "gauge", "The version.");
	buffer_print(b, "proxy_build_info{version=\"" VERSION "\"} 1\n");
	metric_append(b, "uptime_seconds", "Time since the start.",
	    (uint64_t)(now.ms - started) / 1000);
	metric_begin(b, "exchanges_total", "counter",
	    "Exchanges that have ended, by what became of them.");
	for (i = 0; i < RESULTS; i++)
		buffer_print(b, "proxy_exchanges_total{result=\"%s\"} %llu\n",
		    result_names[i], (unsigned long long)t->results[i]);
	metric_begin(b, "bytes_total", "counter", "Bytes on connections.");
	for (i = 0; i < 2; i++)
		buffer_print(b,
		    "proxy_bytes_total{side=\"%s\",direction=\"received\"} "
		    "%llu\nproxy_bytes_total{side=\"%s\",direction=\"sent\"} "
		    "%llu\n",
		    sides[i], (unsigned long long)t->received[i], sides[i],
		    (unsigned long long)t->sent[i]);
	metrics_waits(b, t);
	metric_append(b, "connections", "Clients that are served.", t->busy);
	metric_append(b, "connections_most",
	    "Clients that were served at once, at most.", t->busiest);
	metric_append(b, "connections_limit", "The limit, see -m.", t->slots);
	metric_append(b, "descriptors", "Descriptors that are waited for.",
	    t->descriptors);
	metric_append(b, "cache_bytes",
	    "What the cache takes of the disk, at most.", t->stored);
	metric_append(b, "cache_evictions_total",
	    "Entries that gave way to others.", t->evicted);
	metric_append(b, "lookups_total", "Names that were looked up.",
	    t->lookups);
	metric_append(b, "lookup_failures_total",
	    "Lookups that found no address.", t->failed);
	metrics_refusals(b, t);
	metric_append(b, "log_lines_lost_total",
	    "Lines of the log that could not be written.", t->lines_lost);
}

/* The pages of the proxy's own; of two for a path, one is for browsers. */
static const struct page {
	char path[11];
	const char *type;  /* its media type */
	const char *words; /* with % where the host is to stand; or NULL */
	/* Of pages that rules guard, and that nobody stores; or NULL. */
	void (*append)(struct buffer *, const struct exchange *asks);
} pages[] = {
	{ "/", "text/html; charset=utf-8",
	    "<!DOCTYPE html><html lang=en><meta charset=utf-8>"
	    "<meta name=viewport content='width=device-width'>"
	    "<title>proxy</title><style>:root{color-scheme:light dark}</style>"
	    "<p>This is proxy " VERSION ", an HTTP proxy.  From a shell:"
	    "<pre>export http_proxy=http://% https_proxy=http://%</pre>"
	    "<p><a href=/status>What it is doing now</a>, and "
	    "<a href=/metrics>the same for monitors</a>."
	    "<p>Its address for automatic configuration: "
	    "<a href=/proxy.pac>/proxy.pac</a>\n",
	    NULL },
	{ "/", "text/plain; charset=utf-8",
	    "This is proxy " VERSION ", an HTTP proxy at %.\n\n"
	    "To use it from a shell:\n\n"
	    "    export http_proxy=http://% https_proxy=http://%\n"
	    "    curl -x http://% http://example.com/\n\n"
	    "In a browser, give it as the HTTP proxy for all protocols, or\n"
	    "give this address for automatic configuration:\n\n"
	    "    http://%/proxy.pac\n\n"
	    "What it is doing now, for people and for monitors:\n\n"
	    "    http://%/status\n    http://%/metrics\n",
	    NULL },
	{ "/proxy.pac", "application/x-ns-proxy-autoconfig",
	    "function FindProxyForURL(url, host) {\n"
	    "\treturn \"PROXY %\";\n}\n",
	    NULL },
	{ "/status", "text/html; charset=utf-8", NULL, status_html },
	{ "/status", "text/plain; charset=utf-8", NULL, status_lines },
	{ "/metrics", "text/plain; version=0.0.4; charset=utf-8", NULL,
	    metrics_append },
};

/* The page that a request to the proxy itself asks for, or NULL. */
static const struct page *
page_find(const struct request *q)
{
	bool browser = head_lists(&q->head, "Accept", text_of("text/html"));
	size_t i;

	for (i = 0; i < sizeof(pages) / sizeof(pages[0]); i++)
		if (text_equals(q->uri, text_of(pages[i].path)) &&
		    (browser || strncmp(pages[i].type, "text/html", 9) != 0))
			return &pages[i];
	return NULL;
}

/* Makes a page of what is in b, which it gives back; refuses one too long. */
static void
page_send(struct exchange *x, const char *type, const char *fields,
    struct buffer *b, enum refusal refusal)
{
	page_make(x, 200, type, fields, buffer_text(b));
	if (b->overflow || (x->server.in != NULL && x->server.in->overflow))
		page_refusal(x, refusal, "");
	buffer_give(&b);
}

/* Makes a page of the proxy's own. */
static void
page_own(struct exchange *x, const struct page *page)
{
	struct text host = head_value(&x->request->head, "Host"), words;
	struct buffer *b = buffer_take_reserved();

	if (b == NULL)
		return;
	if (page->append != NULL)
		page->append(b, x);
	for (words = text_of(page->words ? page->words : ""); words.len > 0;) {
		buffer_append(b, text_split(&words, '%'));
		buffer_append(b, words.len > 0 ? host : words);
	}
	page_send(x, page->type,
	    page->append ? "Cache-Control: no-store\r\n" : "", b,
	    REFUSE_ANSWER_LONG);
}

/*
 * The answer of a rule: a text, or a file as it is now, which is read like the
 * body of an entry.  One that does not fit into a small buffer is refused.  A
 * 205 or 304 has no content, and a 206 has all of it (RFC 9110 sections 15.3.6,
 * 15.4.5 and 15.3.7).
 */
static void
page_rule(struct exchange *x, const struct rule *rule)
{
	bool empty = rule->status == 205 || rule->status == 304;
	const char *file = empty ? NULL : rule->file;
	struct text words =
	    text_cut(rule->words.at, empty ? 0 : rule->words.len);
	int fd = file ? open(file, O_RDONLY | O_NONBLOCK) : -1;
	unsigned long long size = words.len;
	struct conn *s = &x->server;
	struct stat status;
	char range[64];

	if (file != NULL &&
	    (fd == -1 || fstat(fd, &status) == -1 ||
		!S_ISREG(status.st_mode))) {
		page_refusal(x, REFUSE_FILE, fd == -1 ? strerror(errno) : "");
		fd_drop(&fd);
		return;
	}
	if (fd != -1)
		size = (unsigned long long)status.st_size;
	(void)snprintf(range, sizeof(range),
	    "Content-Range: bytes 0-%llu/%llu\r\n", size - (size > 0), size);
	page_make(x, rule->status, rule->type,
	    rule->status == 206 ? range : page_duty(rule->status), words);
	if (s->in != NULL && s->in->overflow)
		page_refusal(x, REFUSE_ANSWER_LONG, "");
	else if (s->in != NULL && fd != -1) {
		s->in->end -= strlen("0\r\n\r\n");
		buffer_print(s->in, "%llu\r\n\r\n", size);
		s->eof = false;
		conn_file(s, fd, x);
		return;
	}
	fd_drop(&fd);
}

/* True if t, from a Host field, is where the client found this proxy. */
static bool
page_is_ours(const struct exchange *x, const struct target *t)
{
	struct address here = address_bound(x->client.fd), named;
	size_t label = strcspn(host_name, ".");

	if (x->peer.family == AF_UNIX)
		return true;
	if (here.port != t->port)
		return false;
	if (address_parse(t->host, t->port, &named))
		return address_same(&named, &here);
	if (text_is(t->host, "localhost"))
		return address_is_loopback(&here);
	return text_is(t->host, host_name) ||
	    text_same(t->host, text_cut(host_name, label));
}

/* Answers an OPTIONS that ends here (RFC 9110 section 9.3.7). */
static void
page_options(struct exchange *x)
{
	page_make(x, 200, NULL,
	    "Allow: GET, HEAD, POST, PUT, DELETE, OPTIONS, "
	    "TRACE, CONNECT\r\n",
	    text_of(""));
}

/*
 * Answers a TRACE that ends here (RFC 9110 section 9.3.8): repeats the request
 * without fields that hold secrets.  One too long for this is refused.
 */
static void
page_trace(struct exchange *x)
{
	const struct request *r = x->request;
	static const char secret[][LISTED_NAME] = { "Authorization",
		"Proxy-Authorization", "Cookie", "" };
	struct buffer *b = buffer_take();

	if (b == NULL)
		return;
	buffer_append(b, r->head.line);
	buffer_word(b, "\r\n");
	fields_append(b, &r->head, secret);
	page_send(x, "message/http", "", b, REFUSE_HEAD_LONG);
}

/* ---- 23. Exchange: changes of phase ---- */

/*
 * The life of a request, in three sections.  This one has what all phases
 * share: changes of phase, refusals, the end, and what rules do to an exchange.
 * In the next two, each phase has a subheading, in the order in which they run,
 * and ends with its step function.  A step does what can be done now and
 * returns true if anything moved; then it, or the step of the phase that it
 * entered, is called again.  A step that has to wait returns false, and has
 * said for what: it tried to read or write, and exchange_is_late() keeps its
 * deadline.
 *
 * A step must never block.  Messages are parsed, built and written by the
 * sections above; these decide what comes next.
 *
 * Door: access_begin, access_body, access_doubt, access_judge, access_refuse,
 * access_response, bend_begin, bend_cuts, bend_delays, bend_drop, bend_hangs,
 * bend_room, bend_spend, exchange_abort, exchange_answer, exchange_close,
 * exchange_drop_tries, exchange_end, exchange_enter, exchange_forget,
 * exchange_is_late, exchange_refuse, exchange_serve, exchange_take,
 * route_again, route_expire, route_judge.
 */

enum {
	/*
	 * Steps of one exchange in a turn, and the bytes read and written after
	 * which it takes no more: others wait meanwhile.
	 */
	STEPS_MAX = 64,
	TURN_BYTES = 512 << 10,
	/* Buffers of a flow in a step. */
	MOVES_MAX = 8,
	/* 1xx responses before the final one. */
	INTERIM_MAX = 64,
	/* RFC 8305 section 5: the next address is tried after this. */
	NEXT_TRY_MS = 250,
	/* The longest message of a SOCKS5 parent, RFC 1928 section 6. */
	GREETING_MAX = 7 + 255,
	/* A parent that could not be reached is skipped for this long. */
	PARENT_FAILED_MS = 30000,
	/* Bytes of a body that rules judge together, if they come in parts. */
	JUDGE_BYTES = 1024,
	/* No more time than this counts for the credit of a rate. */
	CREDIT_US = 1000000
};

/* ---- changes of phase, and the end ---- */

/*
 * Returns x->bend, a new one if there was none, and adds the name of a rule to
 * it; NULL if there is no memory.
 */
static struct bend *
bend_take(struct exchange *x, const struct rule *rule)
{
	struct bend *b = x->bend;
	size_t len;

	if (b == NULL) {
		if ((b = calloc(1, sizeof(*b))) == NULL)
			return NULL;
		b->rate = b->left = UINT64_MAX;
		b->filled_us[0] = b->filled_us[1] = now.us;
		x->bend = b;
	}
	len = strlen(b->rules);
	(void)snprintf(b->rules + len, sizeof(b->rules) - len, "%s%s",
	    len ? "," : "", rule->where);
	trace(x, "bent by %s: %s", rule->where, rule->text);
	return b;
}

/* No rule bends x any more. */
static void
bend_drop(struct exchange *x)
{
	free(x->bend);
	x->bend = NULL;
}

/* Sets whether more must be known before the rules can decide on x. */
static void
access_doubt(struct exchange *x, bool undecided)
{
	struct access *access = &x->request->access;

	if (access->undecided != undecided)
		trace(x, "the rules %s",
		    undecided ? "must know more to decide" : "have decided");
	access->undecided = undecided;
}

/* Takes a free slot; NULL if there is none. */
static struct exchange *
exchange_take(void)
{
	struct exchange *x = exchanges.free;
	const size_t start = offsetof(struct exchange, phase);

	if (exchanges.busy == exchanges.n)
		return NULL;
	if (x != NULL)
		exchanges.free = x->next;
	else
		x = &exchanges.slots[exchanges.used++];
	/* A slot freed and taken again stays in the list of those to run. */
	memset((char *)x + start, 0,
	    offsetof(struct exchange, note.text) - start);
	x->server.fd = x->client.fd = -1;
	exchanges.busy++;
	if (exchanges.busy > totals.busiest)
		totals.busiest = exchanges.busy;
	return x;
}

/* Changes the phase, and starts its clock. */
static void
exchange_enter(struct exchange *x, enum phase phase)
{
	/* The trace has shown the end already; the connection ends later. */
	if (phase != x->phase && (phase != PHASE_FREE || x->record.start))
		trace(x, "%s -> %s%s%s", phases[x->phase].name,
		    phases[phase].name,
		    *phases[phase].waits ? ", waits for " : "",
		    phases[phase].waits);
	x->phase = phase;
	x->since = x->moved = now.ms;
}

/* True if a time has come; else a step waits, until then at the latest. */
static bool
exchange_is_late(struct exchange *x, int64_t until)
{
	x->deadline = least(x->deadline, until);
	return now.ms >= until;
}

/* Closes all connection attempts except x->server. */
static void
exchange_drop_tries(struct exchange *x)
{
	struct route *route = &x->request->route;
	struct other *o;

	for (o = others; route->tries > 0 && o < others + others_used; o++)
		if (o->conn.exchange == x) {
			conn_close(&o->conn, false);
			route->tries--;
		}
}

/* Frees the request, if any, and everything that it owns. */
static void
exchange_forget(struct exchange *x)
{
	if (x->request == NULL)
		return;
	cache_leave(x);
	exchange_drop_tries(x);
	request_drop(&x->request);
}

/*
 * Writes the log line, and clears the request: the slot is ready for the next.
 * A fetch that goes on without its client has no log line.
 */
static void
exchange_end(struct exchange *x)
{
	if (x->record.start) {
		record_exchange(x);
		log_exchange(x);
	}
	exchange_forget(x);
	if (x->record.start)
		trace_end(x);
	bend_drop(x);
	x->traced = false;
	rules_give(&x->rules);
	x->record = (struct record){ 0 };
	flow_start(&x->up, FRAMING_NO_BODY, FRAMING_NO_BODY, 0);
	flow_start(&x->down, FRAMING_NO_BODY, FRAMING_NO_BODY, 0);
}

/* Closes both connections, optionally by a reset, and frees the slot. */
static void
exchange_close(struct exchange *x, bool reset)
{
	exchange_enter(x, PHASE_FREE);
	exchange_end(x);
	conn_close(&x->server, reset);
	conn_close(&x->client, reset);
	x->next = exchanges.free;
	exchanges.free = x;
	exchanges.busy--;
}

/*
 * Ends an exchange early.  A truncated response must not look complete: where
 * closing marks the end of the body, the connection is reset instead.  A tunnel
 * is reset, too, if one side was, or if bytes for one side are lost.
 */
static void
exchange_abort(struct exchange *x, enum end end, enum refusal refusal)
{
	bool starved = x->client.error == ENOMEM || x->server.error == ENOMEM;
	bool lost = x->client.out != NULL || x->down.ready > 0;

	if (starved && x->record.refusal == REFUSE_NONE) {
		end = END_LIMIT;
		refusal = REFUSE_MEMORY;
	}
	x->record.end = end;
	x->record.refusal = x->record.refusal ? x->record.refusal : refusal;
	exchange_close(x,
	    x->tunnel ? end == END_RESET || lost || x->server.out != NULL ||
		    x->up.ready > 0 :
			x->record.status != 0 && (lost || !x->down.done) &&
		    x->down.to == FRAMING_CLOSE);
}

/*
 * Sends a response built in memory, in the same way as any other.  Ends the
 * exchange if there was no memory for it.
 */
static void
exchange_answer(struct exchange *x)
{
	if (x->server.in == NULL)
		exchange_abort(x, END_LIMIT, REFUSE_MEMORY);
	else
		exchange_enter(x, PHASE_RESPONSE);
}

/*
 * Refuses the request with a page, in any phase.  After a response head has
 * gone out, the exchange can only be ended.
 */
static void
exchange_deny(struct exchange *x, enum refusal refusal, const char *detail)
{
	struct request *q = x->request;
	bool ruled = refusals[refusal].cause == CAUSE_RULE;

	if (x->server.error == ENOMEM)
		refusal = REFUSE_MEMORY;
	x->record.refusal = refusal;
	access_doubt(x, false);
	if (ruled && refusal != REFUSE_CROWDED)
		bend_drop(x);
	if (x->record.status != 0 || x->hidden) {
		exchange_abort(x,
		    ruled                      ? END_RULE :
			refusal == REFUSE_SLOW ? END_IDLE :
			x->record.status != 0 || x->phase > PHASE_REQUEST ?
						 END_SERVER :
						 END_CLIENT,
		    refusal);
		return;
	}
	exchange_drop_tries(x);
	cache_leave(x);
	buffer_give(&q->access.answer);
	page_refusal(x, refusal, detail);
	exchange_answer(x);
}

/* ---- what the rules say ---- */

/* Refuses as the rule says: with a page, a login request, or silently. */
static void
access_refuse(struct exchange *x)
{
	const struct request *q = x->request;
	const struct rule *rule = x->record.rule;
	char detail[DETAIL_MAX];
	bool tried = head_has(&q->head, "Proxy-Authorization");
	bool page = q->target.form == FORM_ORIGIN;

	assert(rule != NULL);
	(void)snprintf(detail, sizeof(detail),
	    "To let it in, start the proxy with: -e 'allow client %s%s'",
	    address_host(&x->peer), page ? " page status metrics" : "");
	bend_drop(x);
	if (rule->action == ACTION_DROP)
		exchange_abort(x, END_RULE, REFUSE_RULE);
	else if (rule->action == ACTION_LOGIN)
		exchange_deny(x, tried ? REFUSE_PASSWORD : REFUSE_USER, "");
	else
		exchange_deny(x, rule->refusal,
		    rule->refusal == REFUSE_FOREIGN ||
			    (page && rule->built_in) ?
			detail :
			"");
}

/*
 * True if a rule refuses x, its response r (or NULL) or the server at an
 * address (or NULL); undecided stays open.
 */
static bool
access_is_refused(struct exchange *x, const struct response *r,
    const struct address *server)
{
	bool page = x->request->target.form == FORM_ORIGIN;
	struct verdict verdict =
	    rules_judge(x, page ? GROUP_PAGE : GROUP_ACCESS, r, server);

	access_doubt(x, verdict.undecided != NULL);
	if (verdict.rule == NULL)
		return false;
	x->record.rule = verdict.rule;
	trace(x, "decided by %s: %s", verdict.rule->where, verdict.rule->text);
	return verdict.refuses;
}

/* Judges access, as access_is_refused().  False if x was refused. */
static bool
access_judge(struct exchange *x, const struct response *r,
    const struct address *server)
{
	if (!access_is_refused(x, r, server))
		return true;
	access_refuse(x);
	return false;
}

/* Makes x go through a parent, which may be NULL. */
static void
parent_use(struct exchange *x, struct parent *parent)
{
	x->request->route.parent = parent;
	if (parent != NULL && parent->kind != PARENT_NONE)
		trace(x, "%s %s port %u",
		    parent->kind == PARENT_TO ? "to" : "via", parent->host,
		    parent->port);
}

/*
 * Of a rule's parents that have not failed since that time, returns the first
 * that has not failed lately, or else the first; NULL if there is none.
 */
static struct parent *
parent_choose(struct parent *first, int64_t since)
{
	struct parent *p, *second = NULL;

	for (p = first; p != NULL; p = p->next) {
		if (p->failed >= since)
			continue;
		if (p->failed == 0 || now.ms - p->failed >= PARENT_FAILED_MS)
			return p;
		if (second == NULL)
			second = p;
	}
	return second;
}

/*
 * Chooses the parent; undecided if that needs the server's address, which is
 * NULL if it is not known.
 */
static void
route_judge(struct exchange *x, const struct address *server)
{
	struct request *q = x->request;
	struct verdict verdict = rules_judge(x, GROUP_ROUTE, NULL, server);

	q->access.route_undecided = verdict.undecided != NULL;
	q->route.parents = verdict.rule ? verdict.rule->parents : NULL;
	if (q->route.parents != NULL && verdict.rule->action == ACTION_TO)
		(void)bend_take(x, verdict.rule);
	parent_use(x, parent_choose(q->route.parents, INT64_MAX));
}

/* ---- what rules do to an exchange ---- */

#define RATE_MAX (UINT64_C(1) << 40)

/* The conditions of a `limit` rule, as written. */
static const char *
bend_limited(const struct rule *rule)
{
	const char *s = rule->text;

	s += strcspn(s, " \t");
	s += strspn(s, " \t");
	return s + strcspn(s, " \t");
}

/*
 * True if x's client has as many exchanges under way as a rule allows.  Those
 * that began under earlier rules count if the conditions were the same; fetches
 * that no client waits for do not.
 */
static bool
bend_is_crowded(const struct exchange *x, const struct rule *rule)
{
	const char *limited = bend_limited(rule);
	const struct exchange *y;
	uint64_t n = 0;

	for (y = exchanges.slots; y < exchanges.slots + exchanges.used; y++)
		n += !y->refresh && y->bend != NULL && y->bend->limit != NULL &&
		    memcmp(y->peer.octets, x->peer.octets,
			sizeof(x->peer.octets)) == 0 &&
		    strcmp(bend_limited(y->bend->limit), limited) == 0;
	return n >= rule->amount.first;
}

/* Applies a rule that bends x; false if x was answered, refused or hangs. */
static bool
bend_apply(struct exchange *x, const struct rule *rule)
{
	const struct numbers *amount = &rule->amount;
	struct bend *b = bend_take(x, rule);

	if (b == NULL) {
		exchange_deny(x, REFUSE_MEMORY, "");
		return false;
	}
	switch (rule->action) {
	case ACTION_OFFLINE: /* cache_find() does it */
		break;
	case ACTION_TRACE:
		if (!is_traced(x)) {
			x->traced = true;
			trace_head(x, "c>", buffer_text(x->request->bytes));
		}
		break;
	case ACTION_LIMIT:
		if (!x->refresh && bend_is_crowded(x, rule)) {
			exchange_deny(x, REFUSE_CROWDED, "");
			return false;
		}
		b->limit = rule;
		break;
	case ACTION_HANG:
		cache_leave(x);
		answer_by(x, ANSWER_MEMORY);
		b->unanswered = true;
		exchange_enter(x, PHASE_RESPONSE);
		return false;
	case ACTION_ANSWER:
		if (x->hidden) {
			x->record.rule = rule;
			exchange_abort(x, END_RULE, REFUSE_RULE);
			return false;
		}
		b->answers = true;
		cache_leave(x);
		page_rule(x, rule);
		exchange_answer(x);
		return false;
	case ACTION_DELAY:
		b->delay_ms = (int64_t)(amount->first +
		    random_mix(~x->request->dice) %
			(amount->last - amount->first + 1));
		break;
	case ACTION_RATE:
		b->rate = amount->first < RATE_MAX ? amount->first : RATE_MAX;
		break;
	default:
		b->cut = rule;
		b->left = amount->first;
	}
	return true;
}

/*
 * Applies the rules that bend an exchange.  False if one of them has answered
 * or refused it, or lets it hang.
 */
static bool
bend_begin(struct exchange *x)
{
	struct access *access = &x->request->access;
	const struct rule *rule;
	size_t at = 0;

	if (access->bent)
		return true;
	access->bent = true;
	while ((rule = rules_bend(x, &at)) != NULL)
		if (!bend_apply(x, rule))
			return false;
	return true;
}

/* True if x is never to get a response. */
static bool
bend_hangs(const struct exchange *x)
{
	return x->bend != NULL && x->bend->unanswered;
}

/* True if the response must still wait. */
static bool
bend_delays(struct exchange *x)
{
	struct bend *b = x->bend;

	if (b == NULL || b->delay_ms == 0)
		return false;
	if (b->until == 0)
		b->until = now.ms + b->delay_ms;
	if (!exchange_is_late(x, b->until))
		return true;
	b->delay_ms = b->until = 0;
	x->moved = now.ms;
	return false;
}

/*
 * How many bytes of f may go on now.  Credit grows with time, to a tenth of a
 * second's worth at most.
 */
static uint64_t
bend_room(struct exchange *x, const struct flow *f)
{
	struct bend *b = x->bend;
	bool down = f == &x->down;
	uint64_t elapsed, room;

	if (b == NULL)
		return UINT64_MAX;
	if (b->rate == UINT64_MAX)
		return down ? b->left : UINT64_MAX;
	elapsed = (uint64_t)least(now.us - b->filled_us[down], CREDIT_US);
	b->filled_us[down] = now.us;
	b->credit[down] =
	    (uint64_t)least((int64_t)(b->credit[down] + elapsed * b->rate),
		(int64_t)(b->rate / 10 + 1) * 1000000);
	room = b->credit[down] / 1000000;
	return down && b->left < room ? b->left : room;
}

/*
 * n bytes of f have gone on.  The rest waits until half of the largest credit
 * is there, so that no credit is lost.
 */
static void
bend_spend(struct exchange *x, const struct flow *f, uint64_t n)
{
	struct bend *b = x->bend;
	bool down = f == &x->down;

	if (b == NULL)
		return;
	if (down && b->left != UINT64_MAX)
		b->left -= n;
	if (b->rate == UINT64_MAX)
		return;
	b->credit[down] -= n * 1000000;
	if (f->ready > 0)
		(void)exchange_is_late(x,
		    now.ms + 1 +
			(int64_t)((b->rate / 20 + 1) * 1000 / b->rate));
}

/* True if the client has all that a `cut` lets through, and there is more. */
static bool
bend_cuts(const struct exchange *x)
{
	return x->bend != NULL && x->bend->left == 0 && x->client.out == NULL &&
	    x->down.ready > 0;
}

/*
 * Judges a new request by the rules now in force, which apply to it until it
 * ends; one for a page of the proxy's own has no route.  False if it was
 * refused.
 */
static bool
access_begin(struct exchange *x)
{
	struct request *q = x->request;

	rules_take(x);
	q->dice = random_mix(options.seed + x->number);
	if (q->target.form != FORM_ORIGIN)
		route_judge(x, NULL);
	if (!access_judge(x, NULL, NULL))
		return false;
	if (q->target.form == FORM_ORIGIN)
		return true;
	rules_rewrite(x, NULL, &q->rewrites);
	return q->access.undecided || bend_begin(x);
}

/*
 * Judges the response r, parsed from head, by rules that were undecided.  False
 * if it was refused.  The proxy's own answers need no more judgment.  While
 * undecided, the head is kept until the body decides; in front of it, one byte
 * for each text of the rules says how much of that was found so far.
 */
static bool
access_response(struct exchange *x, const struct response *r, struct text head)
{
	const struct request *q = x->request;
	struct access *access = &x->request->access;
	struct buffer *b;

	if (!access->undecided || access->answer != NULL ||
	    q->method == METHOD_CONNECT || q->answerer == ANSWER_MEMORY ||
	    (r->status < 200 && r->status != 101))
		return true;
	if (!access_judge(x, r, NULL))
		return false;
	if (!access->undecided || r->status == 101)
		return true;
	access->answer = b = buffer_take();
	if (b != NULL) {
		memset(b->data, 0, NEEDLES_MAX);
		b->start = b->end = NEEDLES_MAX;
		buffer_append(b, head);
		if (b->overflow == 0)
			return true;
	}
	exchange_deny(x, b ? REFUSE_ANSWER_LONG : REFUSE_MEMORY, "");
	return false;
}

/*
 * Judges a piece of the body, the last one if `whole`, by the texts in it and
 * the length so far.  True if it may pass.  Small pieces are judged together
 * when they are JUDGE_BYTES, since each time the head is parsed again.
 */
static bool
access_body(struct exchange *x, struct text piece, bool whole)
{
	struct access *access = &x->request->access;
	bool more = rules_seek(x, piece), refused;
	struct response r;

	access->unjudged += piece.len;
	if (!whole && !more && access->unjudged < JUDGE_BYTES)
		return true;
	access->unjudged = 0;
	(void)response_parse(buffer_text(access->answer), x->request->method,
	    &r);
	refused = access_is_refused(x, &r, NULL);
	if (whole)
		access_doubt(x, false);
	if (whole || !access->undecided)
		buffer_give(&access->answer);
	return !refused;
}

/* ---- answers from elsewhere ---- */

/*
 * Makes the entry in l the server: its head is parsed and passed on like any
 * other if the rules allow it.  Takes over its descriptor and buffer.
 */
static void
exchange_serve(struct exchange *x, const struct lookup *l)
{
	struct request *q = x->request;

	/* It may stand in for an error. */
	x->record.end = END_DONE;
	exchange_drop_tries(x);
	conn_close(&x->server, false);
	conn_file(&x->server, l->fd, x);
	x->server.in = l->b;
	/* The rules judged the route, not the server of this entry. */
	if (q->route.n > 0 || q->route.parent != NULL)
		access_doubt(x, true);
	q->route.n = 0;
	q->route.list[0] = address_read(l->e.server);
	q->body = l->e.body;
	buffer_give(&q->access.answer);
	if (!access_response(x, &l->r, l->e.head))
		return;
	l->b->start = (size_t)(l->e.head.at - l->b->data);
	if (bend_begin(x))
		exchange_enter(x, PHASE_RESPONSE);
}

/*
 * Starts again on the way to the server: from the name lookup (RESOLVE) or
 * from the first connection attempt (CONNECT).
 */
static void
route_again(struct exchange *x, enum phase phase)
{
	struct route *route = &x->request->route;

	exchange_drop_tries(x);
	conn_close(&x->server, false);
	route->next = 0;
	route->greeting = GREETING_METHOD;
	route->reused = route->keep = false;
	exchange_enter(x, phase);
}

/*
 * Turns to another parent of the rule; false if all have failed since the
 * request came.  A parent has not failed if it was asked for the server and
 * only that could not be reached.
 */
static bool
parent_next(struct exchange *x)
{
	struct request *q = x->request;
	struct parent *parent;

	if (exchange_parent(x) == NULL || x->record.status != 0 ||
	    q->route.greeting == GREETING_REPLY)
		return false;
	q->route.parent->failed = now.ms;
	parent = parent_choose(q->route.parents, x->record.start);
	if (parent == NULL)
		return false;
	parent_use(x, parent);
	/* The next may be a direct connection: its addresses are judged. */
	access_doubt(x, true);
	q->times.asked = 0;
	x->record.server.family = 0;
	route_again(x, PHASE_RESOLVE);
	return true;
}

/*
 * Handles a failure: tries another parent, or serves a stale entry, or
 * refuses the request.
 */
static void
exchange_refuse(struct exchange *x, enum refusal refusal, const char *detail)
{
	enum cause cause = refusals[refusal].cause;
	struct lookup l;

	trace(x, "refused: %s%s%s%s", refusals[refusal].words,
	    detail[0] ? " (" : "", detail, detail[0] ? ")" : "");
	if (x->phase < PHASE_RESPONSE && cause == CAUSE_WAY && parent_next(x))
		return;
	if (x->record.status == 0 &&
	    (cause == CAUSE_WAY || cause == CAUSE_ANSWER) &&
	    cache_validate(x, NULL, &l) == CACHED_YES)
		exchange_serve(x, &l);
	else
		exchange_deny(x, refusal, detail);
}

/* Refuses the request if the way to its server takes too long; true if so. */
static bool
route_expire(struct exchange *x, enum refusal refusal)
{
	const struct address *to = &x->record.server;

	if (!exchange_is_late(x, x->since + CONNECT_MS))
		return false;
	exchange_refuse(x, refusal, to->family ? address_words(to) : "");
	return true;
}

/* ---- 24. Exchange: from the request to the server ---- */

/*
 * The phases REQUEST, COLLAPSE, RESOLVE, CONNECT and GREET, each with a
 * subheading: a request is taken, judged and looked up, and a way to a server
 * is found.
 *
 * Door: collapse_step, connect_step, exchange_hop, exchange_take_refresh,
 * greet_step, request_step, resolve_step.
 */

/* ---- REQUEST: a whole head, and who answers it ---- */

/*
 * Moves the first n bytes from the client to the request, as its head; the
 * rest stays in `in`.  Without memory, sets the client's error: false.
 */
static bool
request_take(struct exchange *x, size_t n)
{
	struct buffer *head = x->client.in, *rest = NULL;
	size_t more = buffer_len(head) - n;

	if (more > 0) {
		rest = buffer_take();
		if (rest == NULL) {
			x->client.error = ENOMEM;
			return false;
		}
		buffer_append(rest,
		    text_cut(head->data + head->start + n, more));
		head->end -= more;
	}
	x->request->bytes = head;
	x->client.in = rest;
	x->client.seen = 0;
	return true;
}

/*
 * Keeps a head that is wrong or truncated, as far as it came, for the log, and
 * whether the answer must have no body.
 */
static void
request_salvage(struct exchange *x)
{
	struct request *q = x->request;
	struct text t;

	request_clean(x->client.in);
	request_mask(x->client.in);
	t = buffer_text(x->client.in);
	trace_head(x, "c>", t);
	tape_add(x, TAPE_REQUEST_HEAD, t);
	q->bytes = x->client.in;
	x->client.in = NULL;
	if (text_starts(t, "HEAD "))
		q->method = METHOD_HEAD;
	q->uri = line_next(&t, NULL);
}

/* Refuses a malformed request and closes: its end is unknown. */
static void
request_reject(struct exchange *x, enum refusal refusal)
{
	request_salvage(x);
	x->close = true;
	exchange_refuse(x, refusal, "");
}

/* Derives from the head what later phases need. */
static void
request_note(struct exchange *x)
{
	struct request *q = x->request;

	x->close = q->minor == 0 || q->method == METHOD_CONNECT ||
	    head_lists(&q->head, "Connection", text_of("close"));
	q->kept = head_lists(&q->head, "Connection", text_of("keep-alive")) ||
	    head_lists(&q->head, "Proxy-Connection", text_of("keep-alive"));
	q->login = head_logs_in(&q->head, "Authorization") ||
	    head_logs_in(&q->head, "Proxy-Authorization");
	q->upgrade = q->minor == 1 && head_has(&q->head, "Upgrade") &&
	    head_lists(&q->head, "Connection", text_of("upgrade")) &&
	    !head_lists(&q->head, "Upgrade", text_of("h2c"));
	flow_start(&x->up, q->framing, q->framing, q->length);
}

/* Answers a request to the proxy itself: with a page or a refusal. */
static void
request_local(struct exchange *x)
{
	const struct request *q = x->request;
	struct text host = head_value(&q->head, "Host");
	const struct page *page = page_find(q);
	struct target t;

	if (authority_parse(host, 80, &t) != 1 || !page_is_ours(x, &t)) {
		x->close = true;
		exchange_refuse(x, REFUSE_NOT_US, "as in http://example.com/");
	} else if (page == NULL)
		exchange_refuse(x, REFUSE_PAGE,
		    "it has / and /proxy.pac, /status and /metrics");
	else if (q->method != METHOD_GET && q->method != METHOD_HEAD)
		exchange_refuse(x, REFUSE_PAGE_METHOD, "");
	else if (page->append == NULL || access_begin(x)) {
		page_own(x, page);
		exchange_answer(x);
	}
}

/*
 * Takes a slot for a fetch without a client.  head, or NULL, is its request,
 * which it owns.  NULL, and head is freed, if there is no slot or memory.
 */
static struct exchange *
exchange_take_refresh(const struct exchange *x, struct buffer *head)
{
	struct request *q = request_new(NULL, RESERVED);
	struct exchange *y = q == NULL ? NULL : exchange_take();

	if (y == NULL) {
		buffer_give(&head);
		request_drop(&q);
		return NULL;
	}
	exchange_enter(y, PHASE_REQUEST);
	y->request = q;
	q->owner = y;
	y->client.eof = true;
	y->client.exchange = y;
	y->client.in = head;
	y->peer = x->peer;
	y->local = x->local;
	y->refresh = true;
	exchange_queue(y);
	return y;
}

/*
 * Sends the same request in the background, in an exchange without a client,
 * to revalidate the entry.  One such fetch runs at a time.  Without a free
 * slot nothing is done: the next request will try again.
 */
static void
exchange_refresh(struct exchange *x)
{
	static const char personal[][LISTED_NAME] = { "Cache-Control", "Pragma",
		"Authorization", "Range", "If-Range", "If-Match",
		"If-None-Match", "If-Modified-Since", "If-Unmodified-Since",
		"" };
	const struct request *q = x->request;
	struct buffer *head = buffer_take();
	struct exchange *y;

	if (head == NULL)
		return;
	/* Without directives, conditions and login: the answer suits all. */
	buffer_word(head, "GET ");
	buffer_append(head, q->uri);
	buffer_print(head, " HTTP/1.%u\r\n", q->minor);
	fields_append(head, &q->head, personal);
	y = exchange_take_refresh(x, head);
	if (y != NULL)
		(void)cache_detach(x, y);
}

/*
 * Asks the cache: an entry answers, or x waits for another fetch, or x is
 * refused as only an entry may answer it, or the server is asked.
 */
static void
exchange_look_up(struct exchange *x)
{
	struct lookup l;
	enum cached cached = cache_find(x, &l);

	if (cached == CACHED_YES) {
		if (l.reuse == REUSE_MEANWHILE)
			exchange_refresh(x);
		exchange_serve(x, &l);
	} else if (cached != CACHED_NEVER)
		exchange_enter(x,
		    cached == CACHED_WAIT ? PHASE_COLLAPSE : PHASE_RESOLVE);
	else if (bend_begin(x))
		exchange_refuse(x, REFUSE_NOT_STORED, "");
}

/*
 * COLLAPSE: waits at most COLLAPSE_MS until another exchange has the response
 * head, then asks the cache again, and if need be the server.
 */
static bool
collapse_step(struct exchange *x)
{
	if (x->request->answerer == ANSWER_AWAITED &&
	    !exchange_is_late(x, x->since + COLLAPSE_MS))
		return false;
	exchange_look_up(x);
	return true;
}

/*
 * Turns an intercepted request, for a path or *, into one to a proxy: its URL
 * is made of Host, which is only a claim of the client.  Returns as a parser.
 */
static int
request_adopt(struct request *q)
{
	struct text host = head_value(&q->head, "Host");
	struct buffer *b = q->bytes;
	struct target t;
	size_t start = b->end;
	int verdict = authority_parse(host, 80, &t);

	if (verdict != 1)
		return verdict;
	q->target.host = t.host;
	q->target.port = t.port;
	/* The form for a proxy of * has no path (RFC 9112 section 3.2.4). */
	if (q->target.form == FORM_ASTERISK)
		q->target.path = text_of("");
	q->target.form = FORM_ABSOLUTE;
	/* The log shows it whole, if there is room. */
	buffer_print(b, "http://%.*s", (int)host.len, host.at);
	buffer_append(b, q->target.path);
	if (b->overflow == 0)
		q->uri = text_cut(b->data + start, b->end - start);
	return 1;
}

/* Parses the head in the request's bytes, and decides who answers. */
static void
request_accept(struct exchange *x)
{
	struct request *q = x->request;
	int verdict, last;

	request_clean(q->bytes);
	verdict = request_parse(buffer_text(q->bytes), q);
	if (verdict != 1)
		request_mask(q->bytes);
	trace_head(x, "c>", buffer_text(q->bytes));
	tape_add(x, TAPE_REQUEST_HEAD, buffer_text(q->bytes));
	if (verdict == 1 && x->intercepted &&
	    (q->target.form == FORM_ORIGIN || q->target.form == FORM_ASTERISK))
		verdict = request_adopt(q);
	request_note(x);
	last = request_is_last(q);
	if (verdict != 1 || last < 0) {
		x->close = true;
		exchange_refuse(x,
		    (enum refusal)(verdict != 1 ? -verdict : -last), "");
	} else if (q->target.form == FORM_ORIGIN)
		request_local(x);
	else if (!access_begin(x))
		return;
	else if (last) {
		(q->method == METHOD_TRACE ? page_trace : page_options)(x);
		exchange_answer(x);
	} else if (request_passed_here(q))
		exchange_refuse(x, REFUSE_LOOP_VIA, "");
	else
		exchange_look_up(x);
}

/*
 * An intercepted client speaks TLS: it wants a tunnel to the server that its
 * greeting names, and knows nothing of us.  What it sent stays in `in`.  False
 * if more of it is to come.
 */
static bool
request_tunnel(struct exchange *x)
{
	static char flat[HELLO_MAX];
	struct conn *c = &x->client;
	struct text t = buffer_text(c->in), name = hello_name(t, flat);
	struct buffer *head;

	x->hidden = true;
	if (name.len == 0 && !c->eof && !c->error && buffer_room(c->in) > 0 &&
	    !hello_is_whole(t, flat))
		return false;
	head = name.len > 0 ? buffer_take() : NULL;
	if (head == NULL) {
		request_salvage(x);
		exchange_abort(x, END_CLIENT,
		    name.len > 0 ? REFUSE_MEMORY : REFUSE_NAMELESS);
		return true;
	}
	buffer_print(head,
	    "CONNECT %.*s:443 HTTP/1.1\r\nHost: %.*s:443\r\n\r\n",
	    (int)name.len, name.at, (int)name.len, name.at);
	x->request->bytes = head;
	request_accept(x);
	return true;
}

/* Gives x the next number; no two workers give the same one. */
static void
exchange_number(struct exchange *x)
{
	x->number = exchanges.count++ * options.workers + (worker ? worker : 1);
}

/* Starts a request and its clock, at its first byte.  False without memory. */
static bool
request_start(struct exchange *x)
{
	if (x->record.start == 0) {
		x->record.start = x->since = now.ms;
		exchange_number(x);
	}
	if (x->request == NULL)
		x->request = request_new(x, RESERVED);
	return x->request != NULL;
}

/*
 * Drops empty lines before a request (RFC 9112 section 2.2).  False if nothing
 * else has arrived but the CR of one, or without memory.
 */
static bool
request_begin(struct exchange *x)
{
	struct conn *c = &x->client;

	while (c->in != NULL && text_starts(buffer_text(c->in), "\r\n"))
		conn_drop_head(c, 2);
	return c->in != NULL &&
	    !text_equals(buffer_text(c->in), text_of("\r")) && request_start(x);
}

/* Refuses a request unread, for lack of memory. */
static void
request_starve(struct exchange *x)
{
	x->close = true;
	x->client.error = 0;
	buffer_give(&x->client.in);
	if (x->request == NULL)
		x->request = request_new(x, 0);
	if (request_start(x))
		exchange_refuse(x, REFUSE_MEMORY, "");
	else
		exchange_abort(x, END_LIMIT, REFUSE_MEMORY);
}

/* Closes a connection whose PROXY header is missing, wrong or not believed. */
static void
header_refuse(struct exchange *x, enum end end, enum refusal refusal)
{
	x->record.start = x->since;
	exchange_number(x);
	x->note.dns_ms = x->note.connect_ms = -1;
	exchange_abort(x, end, refusal);
}

/*
 * Takes the PROXY header at the start of a connection.  A trusted peer that
 * closes without having sent a byte is not logged: load balancers check in this
 * way that the proxy accepts connections.
 */
static bool
header_step(struct exchange *x)
{
	struct conn *c = &x->client;
	struct address client = x->peer;
	int n = c->in ? header_parse(buffer_text(c->in), &client) : 0;

	if (!rules_trust(x))
		header_refuse(x, END_RULE, REFUSE_HEADER_PEER);
	else if (n < 0)
		header_refuse(x, END_CLIENT, (enum refusal)(-n));
	else if (n > 0) {
		conn_drop_head(c, (size_t)n);
		x->unnamed = false;
		/* A loopback address is this machine's if the peer is. */
		x->local = x->local && peer_is_local(c->fd, &client);
		x->peer = client;
		trace(x, "behind the PROXY header, the client is %s",
		    address_words(&client));
	} else if (conn_read(c))
		return true;
	else if (!c->eof && !c->error) {
		if (!exchange_is_late(x, x->since + HEAD_MS))
			return false;
		header_refuse(x, END_IDLE, REFUSE_HEADER_SLOW);
	} else if (c->in != NULL || c->error == ENOMEM)
		header_refuse(x, END_CLIENT, REFUSE_HEADER_CUT);
	else
		exchange_close(x, false);
	return true;
}

/* REQUEST: waits for a whole head. */
static bool
request_step(struct exchange *x)
{
	struct conn *c = &x->client;
	enum refusal refusal = REFUSE_NONE;
	bool came = c->in != NULL, begun, late, tls;
	int n = 0;

	if (x->unnamed)
		return header_step(x);
	begun = request_begin(x);
	/* What has come by then is read; empty lines do not count. */
	late = exchange_is_late(x,
	    x->since + (begun || !x->served ? HEAD_MS : KEPT_CLIENT_MS));
	tls = begun && x->intercepted && !x->served &&
	    request_hopeless(c->in, false) == REFUSE_TLS;
	if (tls && request_tunnel(x))
		return true;
	if (begun && !tls) {
		n = conn_head(c, 0, false);
		refusal = request_hopeless(c->in, n > 0);
		if (refusal == REFUSE_NONE && n < 0)
			refusal = (enum refusal)(-n);
	}
	if (c->error == ENOMEM || (x->record.start && x->request == NULL))
		request_starve(x);
	else if (refusal != REFUSE_NONE)
		request_reject(x, refusal);
	else if (n > 0) {
		if (request_take(x, (size_t)n))
			request_accept(x);
	} else if ((begun || !came || !late) && conn_read(c))
		return true;
	else if (!c->eof && !c->error && !late)
		return false;
	else if (x->record.start == 0)
		exchange_close(x, false);
	else if (!c->eof && !c->error)
		request_reject(x, REFUSE_SLOW);
	else {
		request_salvage(x);
		exchange_abort(x, END_CLIENT, REFUSE_NONE);
	}
	return true;
}

/* ---- RESOLVE: the addresses of the next hop ---- */

/*
 * Puts the addresses of a host, numeric or a name, into the route.  Returns 1
 * if it did, 0 if they are not known yet, -1 if the request was refused.  A
 * numeric host is parsed as the rules parse it.
 */
static int
resolve_host(struct exchange *x, struct text host, unsigned port)
{
	struct request *q = x->request;
	char words[HOST_MAX + 1], detail[DETAIL_MAX];
	struct name *name;
	unsigned i;

	q->times.resolved = now.ms;
	if (address_of_host(host_trim(host), port, &q->route.list[0])) {
		q->route.n = 1;
		return 1;
	}
	q->times.asked = q->times.asked ? q->times.asked : now.ms;
	(void)text_copy(host, words, sizeof(words));
	name = names_find(words);
	if (name != NULL && name->state != NAME_KNOWN)
		return 0;
	if (name == NULL || name->answer.error) {
		(void)snprintf(detail, sizeof(detail), "%s: %s", words,
		    name ? gai_strerror(name->answer.error) : "");
		exchange_refuse(x, name ? REFUSE_NAME : REFUSE_BUSY,
		    name ? detail : "");
		return -1;
	}
	q->route.n = (unsigned char)name->answer.n;
	memcpy(q->route.list, name->answer.list, sizeof(q->route.list));
	for (i = 0; i < q->route.n; i++) {
		address_settle(&q->route.list[i]);
		q->route.list[i].port = (uint16_t)port;
	}
	return 1;
}

/* The local address for a connection: any, unless -b or a rule names one. */
static const struct address *
route_from(const struct route *route, const struct address *to)
{
	static const struct address any;

	return route->from ? &route->from[to->family == AF_INET6] : &any;
}

/*
 * Drops the addresses whose family has no local address and, while access is
 * undecided, those that rules forbid.  Returns a refusal if one is our own or
 * none is left: REFUSE_RULE if rules forbade any.
 */
static enum refusal
resolve_strike(struct exchange *x)
{
	struct request *q = x->request;
	struct route *route = &q->route;
	enum refusal refusal = REFUSE_FAMILY;
	bool direct = exchange_parent(x) == NULL, stays = false;
	bool undecided = q->access.undecided;
	unsigned char i, kept = 0;

	for (i = 0; i < route->n; i++) {
		const struct address *to = &route->list[i];
		struct verdict verdict = { x->record.rule, NULL, false };

		if (address_is_ours(to))
			return REFUSE_LOOP;
		if (route->from != NULL && route_from(route, to)->family == 0)
			continue;
		if (direct && undecided)
			verdict = rules_judge(x, GROUP_ACCESS, NULL, to);
		if (kept == 0)
			x->record.rule = verdict.rule;
		if (verdict.refuses) {
			refusal = REFUSE_RULE;
			continue;
		}
		stays = stays || verdict.undecided != NULL ||
		    verdict.rule != x->record.rule;
		route->list[kept++] = *to;
	}
	route->n = kept;
	if (direct && undecided && !stays)
		access_doubt(x, false);
	return kept ? REFUSE_NONE : refusal;
}

/*
 * Judges the addresses in the list.  If they are the server's, and a rule needs
 * them to choose the parent, chooses it; otherwise they are those of the next
 * hop: drops what rules forbid, and chooses the local address.
 */
static void
resolve_judge(struct exchange *x)
{
	struct request *q = x->request;
	const struct address *server =
	    exchange_parent(x) == NULL ? &q->route.list[0] : NULL;
	char detail[DETAIL_MAX];
	struct verdict verdict;
	enum refusal refusal;

	if (q->access.route_undecided) {
		route_judge(x, server);
		q->access.route_undecided = false;
		q->times.asked = 0;
		if (exchange_parent(x) != NULL && q->access.undecided)
			(void)access_judge(x, NULL, server);
		return;
	}
	if (server == NULL && q->access.undecided &&
	    !access_judge(x, NULL, NULL))
		return;
	verdict = rules_judge(x, GROUP_SOURCE, NULL, server);
	q->route.from = verdict.rule ? verdict.rule->from : NULL;
	refusal = resolve_strike(x);
	if (refusal == REFUSE_NONE) {
		if (bend_begin(x))
			exchange_enter(x, PHASE_CONNECT);
	} else if (refusal == REFUSE_RULE)
		access_refuse(x);
	else {
		(void)snprintf(detail, sizeof(detail), "%.*s port %u",
		    (int)q->target.host.len, q->target.host.at, q->target.port);
		exchange_refuse(x, refusal, detail);
	}
}

/*
 * RESOLVE: looks up the next hop's addresses and judges them.  If the next
 * hop is a parent, the parent looks up the target's name itself.
 */
static bool
resolve_step(struct exchange *x)
{
	struct request *q = x->request;
	const struct parent *parent = q->route.parent;
	int known = parent != NULL && parent->kind != PARENT_NONE ?
	    resolve_host(x, text_of(parent->host), parent->port) :
	    resolve_host(x, q->target.host, q->target.port);

	if (known == 1)
		resolve_judge(x);
	return known != 0 || route_expire(x, REFUSE_NAME_SLOW);
}

/* ---- CONNECT: the addresses in turn ---- */

/* Where a connection to address leads, and how: see struct hop. */
static struct hop
exchange_hop(const struct exchange *x, const struct address *address)
{
	const struct parent *parent = exchange_parent(x);
	const struct request *q = x->request;
	struct hop hop = { .address = *address,
		.from = *route_from(&q->route, address),
		.parent = parent == NULL ? 0 : parent->id };

	if (parent != NULL && parent->kind == PARENT_SOCKS)
		authority_print(q->target.host, q->target.port,
		    q->method == METHOD_CONNECT, hop.beyond);
	return hop;
}

/*
 * True if the request may be sent on a kept connection.  The server may close
 * that at any time, so the request must be repeatable (RFC 9112 section
 * 9.3.1); an unknown method might not be idempotent.
 */
static bool
exchange_is_repeatable(const struct exchange *x)
{
	const struct request *q = x->request;

	return q->method != METHOD_OTHER && q->method != METHOD_POST &&
	    q->method != METHOD_CONNECT && x->up.from == FRAMING_NO_BODY &&
	    !q->upgrade;
}

/* Takes a kept connection to one of the addresses; false without one. */
static bool
connect_reuse(struct exchange *x)
{
	struct route *route = &x->request->route;
	struct other *o;
	unsigned i;

	if (route->next > 0 || route->fresh || !exchange_is_repeatable(x))
		return false;
	for (i = 0; i < route->n; i++) {
		struct hop hop = exchange_hop(x, &route->list[i]);

		while ((o = other_find(&hop)) != NULL && !other_is_quiet(o))
			conn_close(&o->conn, false);
		if (o == NULL)
			continue;
		conn_move(&o->conn, &x->server, ROLE_SERVER, x);
		x->record.server = hop.address;
		route->reused = true;
		trace(x, "on a kept connection");
		return true;
	}
	return false;
}

/*
 * Tries the next address.  A pending attempt continues beside it, or is
 * closed if there is no room for both.
 */
static void
connect_next(struct exchange *x)
{
	struct route *route = &x->request->route;
	struct conn *s = &x->server;
	const struct address *to = &x->record.server;
	struct other *o = s->fd == -1 ? NULL : other_take(true);

	if (o != NULL) {
		conn_move(s, &o->conn, ROLE_TRY, x);
		o->hop.address = *to;
		route->tries++;
	}
	conn_close(s, false);
	route->tried = now.ms;
	x->record.server = route->list[route->next++];
	trace(x, "trying %s", address_words(to));
	s->exchange = x;
	if (conn_connect(s, to, route_from(route, to)))
		conn_watch(s, POLLOUT);
	else
		route->error = errno;
}

/* Checks an attempt at `to': true if connected; closes it if it failed. */
static bool
connect_try(struct exchange *x, struct conn *c, const struct address *to)
{
	struct route *route = &x->request->route;
	int error;

	if (c->fd == -1 || !c->writable)
		return false;
	error = conn_connect_error(c, to);
	if (error == 0) {
		trace(x, "connected");
		return true;
	}
	trace(x, "failed: %s", strerror(error));
	route->error = error;
	if (c->role == ROLE_TRY)
		route->tries--;
	conn_close(c, false);
	return false;
}

/* Checks all attempts; true if one succeeded: it is x->server now. */
static bool
connect_won(struct exchange *x)
{
	struct route *route = &x->request->route;
	struct other *o;

	if (connect_try(x, &x->server, &x->record.server))
		return true;
	for (o = others; route->tries > 0 && o < others + others_used; o++) {
		if (o->conn.exchange != x ||
		    !connect_try(x, &o->conn, &o->hop.address))
			continue;
		conn_close(&x->server, false);
		conn_move(&o->conn, &x->server, ROLE_SERVER, x);
		x->record.server = o->hop.address;
		route->tries--;
		return true;
	}
	return false;
}

/*
 * Refuses the request with the error of the last address.  If a local address
 * chosen by -b or a rule is at fault, names it too.
 */
static void
connect_refuse(struct exchange *x)
{
	const struct route *route = &x->request->route;
	const struct address *to = &x->record.server;
	int error = route->error;
	bool taken = error == EADDRINUSE;
	char detail[DETAIL_MAX];
	size_t n;

	n = (size_t)snprintf(detail, sizeof(detail), "%s: %s",
	    address_words(to), strerror(error));
	if (route->from != NULL && n < sizeof(detail) &&
	    (taken || error == EADDRNOTAVAIL))
		(void)snprintf(detail + n, sizeof(detail) - n,
		    ": %s %s (-b or from)",
		    taken ? "no local port is left at" :
			    "this machine can't use",
		    address_host(route_from(route, to)));
	exchange_refuse(x,
	    error == ECONNREFUSED ? REFUSE_CONNECTION :
		error == ENETUNREACH || error == EHOSTUNREACH ?
				    REFUSE_UNREACHABLE :
		error == ETIMEDOUT ? REFUSE_CONNECT_SLOW :
				     REFUSE_CONNECT,
	    detail);
}

/* Builds the request head, which RESPONSE sends; x->server is connected. */
static void
exchange_send(struct exchange *x)
{
	struct request *q = x->request;
	struct buffer *out = conn_out(&x->server);

	q->times.requested = now.wall;
	if (out != NULL) {
		if (q->rewrites.undecided || x->rules->needles_n > 0)
			rules_rewrite(x, NULL, &q->rewrites);
		request_build(x, out);
	}
	if (out == NULL || out->overflow) {
		exchange_refuse(x, out ? REFUSE_HEAD_LONG : REFUSE_MEMORY, "");
		return;
	}
	trace_change(x, ">s", NULL, buffer_text(out));
	answer_by(x, ANSWER_SERVER);
	exchange_enter(x, PHASE_RESPONSE);
}

/*
 * The next hop is connected.  The proxy answers a CONNECT itself, unless that
 * goes to an HTTP parent; any bytes that arrived behind a SOCKS parent's reply
 * follow.  For other requests, no bytes may come before the request is sent
 * (RFC 9112 section 9.2).  Of several addresses that the rules let in, each may
 * be let in by another rule.
 */
static void
connect_open(struct exchange *x)
{
	struct buffer *early = x->server.in, *b;

	x->request->times.connected = now.ms;
	if (x->request->access.undecided && !access_judge(x, NULL, NULL))
		return;
	if (x->request->method != METHOD_CONNECT || exchange_is_relayed(x)) {
		if (early != NULL)
			exchange_refuse(x, REFUSE_EARLY, "");
		else
			exchange_send(x);
		return;
	}
	answer_by(x, ANSWER_MEMORY);
	x->server.in = b = buffer_take_reserved();
	if (b != NULL)
		buffer_append(b,
		    text_of("HTTP/1.1 200 Connection established\r\n\r\n"));
	if (b != NULL && early != NULL)
		buffer_append(b, buffer_text(early));
	buffer_give(&early);
	exchange_answer(x);
}

/* Sends a message to a SOCKS5 parent; `next` is the reply expected of it. */
static void
greet_say(struct exchange *x, enum greeting next)
{
	x->request->route.greeting = next;
	if (conn_out(&x->server) == NULL)
		exchange_refuse(x, REFUSE_MEMORY, "");
	else
		greet_append(x, x->server.out);
}

/* CONNECT: tries the addresses in turn, the next after NEXT_TRY_MS. */
static bool
connect_step(struct exchange *x)
{
	struct route *route = &x->request->route;
	bool reused = connect_reuse(x);

	if (reused || connect_won(x)) {
		exchange_drop_tries(x);
		if (!reused && exchange_parent(x) != NULL &&
		    !exchange_is_relayed(x)) {
			exchange_enter(x, PHASE_GREET);
			greet_say(x, GREETING_METHOD);
		} else
			connect_open(x);
		return true;
	}
	if (x->server.fd != -1 || route->tries > 0) {
		if (route_expire(x, REFUSE_CONNECT_SLOW))
			return true;
		if (route->next == route->n ||
		    !exchange_is_late(x, route->tried + NEXT_TRY_MS))
			return false;
	}
	if (route->next < route->n)
		connect_next(x);
	else
		connect_refuse(x);
	return true;
}

/* ---- GREET: a SOCKS5 parent (RFC 1928, RFC 1929) ---- */

/* Handles a whole message from the parent by its code. */
static void
greet_answer(struct exchange *x, unsigned char code)
{
	enum greeting greeting = x->request->route.greeting;

	if (greeting == GREETING_REPLY && code == 0)
		connect_open(x);
	else if (greeting == GREETING_REPLY)
		exchange_refuse(x, REFUSE_PARENT, greet_words(code));
	else if (code == 0)
		greet_say(x, GREETING_REPLY);
	else if (greeting == GREETING_METHOD && code == 2 &&
	    exchange_parent(x)->login)
		greet_say(x, GREETING_LOGIN);
	else
		exchange_refuse(x, REFUSE_PARENT_LOGIN, "SOCKS5 login failed");
}

/* GREET: the handshake with a SOCKS5 parent. */
static bool
greet_step(struct exchange *x)
{
	enum greeting greeting = x->request->route.greeting;
	struct conn *s = &x->server;
	struct text t;
	size_t n;

	(void)conn_write(s);
	t = s->in == NULL ? text_of("") : buffer_text(s->in);
	n = greet_length(greeting, t);
	if (n > 0 && t.len >= n) {
		unsigned char code = (unsigned char)t.at[1];

		buffer_use(&s->in, n);
		greet_answer(x, code);
	} else if (n == 0)
		exchange_refuse(x, REFUSE_PARENT, "it does not speak SOCKS5");
	else if (s->eof || s->error || s->write_failed)
		exchange_refuse(x, REFUSE_PARENT, "it closed the connection");
	else
		return conn_read_some(s, GREETING_MAX) ||
		    route_expire(x, REFUSE_CONNECT_SLOW);
	return true;
}

/* ---- 25. Exchange: from the response to the end ---- */

/*
 * The phases RESPONSE, RELAY and LINGER, each with a subheading: a response is
 * judged and forwarded, and both connections are left as they should be.  The
 * table of all phases stands at the end.
 *
 * Door: exchange_open, exchange_run.
 */

/* ---- a body from one side to the other ---- */

/*
 * Drops payload that the client already has.  A body that ends within it is
 * not the same payload.
 */
static void
exchange_skip(struct exchange *x)
{
	struct request *q = x->request;
	struct flow *f = &x->down;
	size_t n = f->ready < q->skip ? f->ready : (size_t)q->skip;

	if (n > 0)
		buffer_use(&x->server.in, n);
	f->ready -= (uint32_t)n;
	q->skip -= n;
	if (f->whole && q->skip > 0) {
		f->whole = false;
		f->broken = true;
		f->cut = true;
	}
}

/*
 * Reads from one side, as conn_read().  Of an entry that is being stored, reads
 * no more than is there: the end of the file is not yet the end of the body.
 */
static bool
exchange_read(struct exchange *x, struct conn *from)
{
	const struct request *q = from == &x->server ? x->request : NULL;
	bool grows = q != NULL &&
	    (q->answerer == ANSWER_FETCH || q->answerer == ANSWER_FAILED);
	uint64_t room = grows ?
	    q->caching.stored - x->down.payload - x->down.ready :
	    BUFFER_ROOM;
	size_t max = room < BUFFER_ROOM ? (size_t)room : BUFFER_ROOM;

	if (max == 0)
		from->readable = false;
	if (!conn_read_some(from, max))
		return false;
	/* The bytes had been stored: someone truncated the file. */
	if (grows && from->eof) {
		from->error = EIO;
		from->eof = false;
	}
	return true;
}

/*
 * Shows a piece of a body, or its end, to rules, cache, recording and trace.
 * If a rule forbids it, drops the piece and marks the flow as broken.  The
 * first bytes of a tunnel's client may name the server, for the log.
 */
static void
exchange_see(struct exchange *x, struct flow *f, struct text piece)
{
	static char flat[HELLO_MAX];
	struct request *q = f == &x->down ? x->request : NULL;

	if (f->done || (piece.len == 0 && !f->whole))
		return;
	if (q != NULL && q->access.answer != NULL &&
	    !access_body(x, piece, f->whole)) {
		f->ready -= (uint32_t)piece.len;
		f->whole = false;
		f->broken = true;
		x->record.refusal = REFUSE_RULE;
		cache_append(x, text_of(""), false);
		return;
	}
	if (q != NULL)
		cache_append(x, piece, f->whole);
	if (piece.len == 0)
		return;
	if (x->request != NULL)
		tape_add(x,
		    f == &x->up ? TAPE_REQUEST_BODY : TAPE_RESPONSE_BODY,
		    piece);
	if (x->tunnel && f == &x->up && f->payload + f->ready == piece.len)
		log_note_name(x, hello_name(piece, flat));
	if (options.verbose > 1)
		trace_dump(x, f == &x->up ? "c>s" : "s>c", piece);
}

/*
 * Forwards a message until one side has to wait; true if anything moved.
 * Framing, payload and the end are collected in `out`, so that a small message
 * is one write.
 */
static bool
exchange_pump(struct exchange *x, struct flow *f, struct conn *from,
    struct conn *to)
{
	bool moved = false;
	unsigned n;

	for (n = 0; n < MOVES_MAX && !to->write_failed; n++) {
		uint64_t most, passed = f->payload;
		size_t old = f->ready, held;

		if (to->out != NULL && !to->writable && !to->hangup &&
		    to->fd != -1)
			break;
		if (!f->done)
			flow_decode(f, from->in, from->eof);
		if (f == &x->down && x->request != NULL && x->request->skip > 0)
			exchange_skip(x);
		assert(f->ready == old || from->in != NULL);
		exchange_see(x, f,
		    f->ready > old ?
			text_cut(from->in->data + from->in->start + old,
			    f->ready - old) :
			text_of(""));
		if (f->ready == 0 && !f->whole && !f->broken &&
		    exchange_read(x, from) && !from->error) {
			moved = true;
			continue;
		}
		most = bend_room(x, f);
		if (!f->done && flow_encode(f, from, to, most))
			moved = true;
		bend_spend(x, f, f->payload - passed);
		held = buffer_held(to->out);
		(void)conn_write(to);
		/* Bytes of a peer that has gone do not extend the timeout. */
		if (buffer_held(to->out) < held &&
		    !(x->tunnel && conn_is_gone(from)))
			x->moved = now.ms;
		if (to->out || f->done || (f->ready == 0 && !f->whole) ||
		    f->payload - passed == most)
			break;
	}
	return moved;
}

/* Why x can't go on: a flow is broken, or the server failed. */
static enum refusal
exchange_fault(const struct exchange *x)
{
	if (x->up.broken)
		return x->up.cut ? REFUSE_BODY_CUT : REFUSE_BODY;
	return x->down.broken && !x->down.cut ? REFUSE_ANSWER_BODY :
						REFUSE_CUT_SHORT;
}

/*
 * Builds the head for the client in its `out`, and drops the server's, n
 * bytes of `in`.  False, after a refusal, if it does not fit.
 */
static bool
response_pass(struct exchange *x, const struct response *r, size_t n)
{
	struct conn *s = &x->server;
	struct buffer *out;

	if (x->hidden) {
		exchange_abort(x, END_SERVER, REFUSE_PARENT);
		return false;
	}
	out = conn_out(&x->client);
	if (out == NULL && x->request->answerer == ANSWER_MEMORY)
		exchange_abort(x, END_LIMIT, REFUSE_MEMORY);
	else if (out == NULL)
		exchange_refuse(x, REFUSE_MEMORY, "");
	if (out == NULL)
		return false;
	response_build(x, r, out);
	if (out->overflow) {
		buffer_give(&x->client.out);
		exchange_refuse(x, REFUSE_ANSWER_LONG, "");
		return false;
	}
	if (x->request->answerer == ANSWER_MEMORY)
		trace_head(x, ">c", buffer_text(out));
	else
		trace_change(x, ">c", r, buffer_text(out));
	tape_add(x, TAPE_RESPONSE_HEAD, buffer_text(out));
	conn_drop_head(s, n);
	return true;
}

/* ---- RESPONSE: the response head ---- */

/* True if r is a 407 that the client would take for the proxy's own. */
static bool
response_wants_login(const struct exchange *x, const struct response *r)
{
	return r->status == 407 && !answer_is_local(x->request) &&
	    (!exchange_is_relayed(x) || exchange_parent(x)->login ||
		x->rules->logins);
}

/*
 * Passes a 1xx on, unless the client is HTTP/1.0 (RFC 9110 section 15.2), or
 * expects the server itself.
 */
static void
response_interim(struct exchange *x, const struct response *r, size_t n)
{
	struct request *q = x->request;

	x->moved = now.ms;
	if (++q->interims > INTERIM_MAX)
		exchange_refuse(x, REFUSE_INTERIM, "");
	else if (q->minor == 1 && x->record.status == 0 && !x->hidden)
		(void)response_pass(x, r, n);
	else
		conn_drop_head(&x->server, n);
}

/* True if the server connection can be reused after r. */
static bool
response_keeps_server(const struct exchange *x, const struct response *r)
{
	const struct request *q = x->request;

	return !answer_is_local(q) && r->minor == 1 &&
	    !(r->mended & MEND_LENGTH) && r->framing != FRAMING_CLOSE &&
	    !q->login && !head_logs_in(&r->head, "WWW-Authenticate") &&
	    !(exchange_is_relayed(x) &&
		head_logs_in(&r->head, "Proxy-Authenticate")) &&
	    !head_lists(&r->head, "Connection", text_of("close"));
}

/*
 * True if the server may have left the body of the request unread, since such a
 * request has none as a rule (RFC 9110 section 9.3.1): then it takes the body
 * for the beginning of the next request, which may be another client's.
 */
static bool
request_misleads(const struct exchange *x)
{
	enum method method = x->request->method;

	return x->up.from != FRAMING_NO_BODY &&
	    (method == METHOD_GET || method == METHOD_HEAD ||
		method == METHOD_DELETE || method == METHOD_TRACE);
}

/* Keeps the server connection for another request, or closes it. */
static void
exchange_release(struct exchange *x)
{
	struct conn *s = &x->server;
	struct hop hop;

	if (!x->request->route.keep || !x->up.done || request_misleads(x) ||
	    s->fd == -1 || s->in != NULL || s->out != NULL || s->readable ||
	    s->eof || s->error || s->write_failed || s->hangup || stop_at) {
		conn_close(s, false);
		return;
	}
	hop = exchange_hop(x, &x->record.server);
	other_keep(s, &hop);
}

/*
 * Decides how the final response is framed for the client (RFC 9112 section
 * 6.3) and whether both connections stay open, and passes the head on.
 */
static void
response_forward(struct exchange *x, const struct response *r, size_t n)
{
	struct request *q = x->request;
	enum framing to = r->framing;

	if (to == FRAMING_CHUNKED || to == FRAMING_CLOSE)
		to = q->minor == 1 ? FRAMING_CHUNKED : FRAMING_CLOSE;
	x->close = x->close || to == FRAMING_CLOSE || !x->up.done || stop_at ||
	    exchanges.crowded;
	flow_start(&x->down, r->framing, to, r->length);
	if (!answer_is_local(q))
		cache_store(x, r);
	if (!response_pass(x, r, n))
		return;
	x->record.status = r->status;
	if (x->record.start)
		log_wait(x);
	if (x->down.whole)
		cache_append(x, text_of(""), true);
	exchange_enter(x, PHASE_RELAY);
}

/*
 * Answers from an entry: with 304 if the client has a current copy, with a
 * range, or with the whole.
 */
static void
response_from_entry(struct exchange *x, struct response *r, size_t n)
{
	uint64_t at = cache_shape(x, r);

	response_forward(x, r, n);
	if (at == 0 || x->phase != PHASE_RELAY)
		return;
	buffer_give(&x->server.in);
	if (lseek(x->server.fd, (off_t)at, SEEK_SET) == -1)
		exchange_abort(x, END_SERVER, REFUSE_CUT_SHORT);
}

/*
 * Lets r, a head of n bytes, validate an entry, or continue a body that the
 * client has in part.  True if r is not forwarded: the entry answers; or it has
 * vanished, and the server is asked again; or the body ends truncated.
 */
static bool
response_validates(struct exchange *x, const struct response *r, size_t n)
{
	struct lookup l;
	enum cached cached;

	if (answer_is_local(x->request))
		return false;
	cached = cache_validate(x, r, &l);
	if (cached == CACHED_NO)
		return false;
	if (r->status == 304) {
		conn_drop_head(&x->server, n);
		exchange_release(x);
	}
	if (cached == CACHED_YES)
		exchange_serve(x, &l);
	else if (cached == CACHED_NEVER)
		exchange_refuse(x, REFUSE_CUT_SHORT, "");
	else
		route_again(x, PHASE_CONNECT);
	return true;
}

/*
 * Handles the response to a request repeated in the middle of a body: the same
 * payload continues after what the client has.
 */
static void
response_resume(struct exchange *x, const struct response *r, size_t n)
{
	struct request *q = x->request;
	struct flow *d = &x->down, old = *d;

	flow_start(d, r->framing, old.to, r->length);
	d->strips = old.strips;
	q->skip = d->payload = old.payload;
	conn_drop_head(&x->server, n);
	exchange_enter(x, PHASE_RELAY);
}

/*
 * Passes the head on, and turns the exchange into a tunnel: two flows that end
 * at the close.  It may live for hours, so the slot keeps what the log needs,
 * and no request.
 */
static void
response_tunnel(struct exchange *x, const struct response *r, size_t n)
{
	if (x->hidden)
		conn_drop_head(&x->server, n);
	else if (!response_pass(x, r, n))
		return;
	x->record.status = r->status;
	log_note(x);
	x->tunnel = true;
	exchange_forget(x);
	flow_start(&x->up, FRAMING_CLOSE, FRAMING_CLOSE, 0);
	flow_start(&x->down, FRAMING_CLOSE, FRAMING_CLOSE, 0);
	exchange_enter(x, PHASE_RELAY);
}

/*
 * Sends the request again on a new connection: a kept one may close, or bring
 * bytes of an older response, just when it is used (RFC 9112 section 9.3.1).
 * It happens once, since the new one is not a kept one.
 */
static void
response_retry(struct exchange *x, const char *why)
{
	trace(x, "the kept connection %s", why);
	x->request->route.fresh = true;
	x->request->times.resolved = now.ms;
	route_again(x, PHASE_CONNECT);
}

/* Handles a whole response head of n bytes. */
static void
response_accept(struct exchange *x, size_t n)
{
	struct text head = text_cut(buffer_text(x->server.in).at, n);
	struct request *q = x->request;
	struct response r;
	int verdict;

	if (!answer_is_local(q))
		trace_head(x, "s>", head);
	verdict = response_parse(head, q->method, &r);
	if (q->route.reused && !answer_is_local(q) && q->interims == 0 &&
	    (verdict == -REFUSE_STATUS_LINE || r.status == 408)) {
		response_retry(x, "brought no answer to this");
		return;
	}
	trace_mended(x, r.mended);
	if (verdict != 1) {
		exchange_refuse(x, REFUSE_ANSWER, refusals[-verdict].words);
		return;
	}
	if (q->times.answered == 0 && (r.status >= 200 || r.status == 101))
		q->times.answered = now.ms;
	q->route.keep = response_keeps_server(x, &r);
	if (response_wants_login(x, &r))
		exchange_refuse(x,
		    exchange_is_relayed(x) ? REFUSE_PARENT_LOGIN : REFUSE_LOGIN,
		    "");
	else if (response_validates(x, &r, n) || !access_response(x, &r, head))
		trace(x, "this answer is not for the client");
	else if (answer_is_stored(q))
		response_from_entry(x, &r, n);
	else if (r.status == 101 && (!q->upgrade || !x->up.done))
		exchange_refuse(x, REFUSE_UPGRADE, "");
	else if (r.status == 101 ||
	    (q->method == METHOD_CONNECT && r.status / 100 == 2))
		response_tunnel(x, &r, n);
	else if (r.status < 200)
		response_interim(x, &r, n);
	else if (x->record.status != 0)
		response_resume(x, &r, n);
	else
		response_forward(x, &r, n);
}

/*
 * What the server has sent, without an empty line in front: one is skipped, as
 * some servers send it after a body, beyond its length.
 */
static struct text
response_begun(const struct conn *s)
{
	struct text t = s->in == NULL ? text_of("") : buffer_text(s->in);

	return text_from(t, text_starts(t, "\r\n") ? 2 : text_starts(t, "\n"));
}

/* The server closed without a response; a kept connection may do that. */
static void
response_lost(struct exchange *x)
{
	struct conn *s = &x->server;
	struct request *q = x->request;
	int error = s->error;
	bool bytes = response_begun(s).len > 0 || q->interims > 0;
	char detail[DETAIL_MAX];

	if (q->route.reused && !bytes) {
		response_retry(x, "was dead");
		return;
	}
	(void)snprintf(detail, sizeof(detail), "%s%s%s",
	    address_words(&x->record.server), error ? ": " : "",
	    error ? strerror(error) : "");
	exchange_refuse(x,
	    bytes     ? REFUSE_CUT_SHORT :
		error ? REFUSE_RESET :
			REFUSE_CLOSED,
	    detail);
}

/*
 * True if no byte was written for so long; the trace then shows which side x
 * waits for.
 */
static bool
exchange_is_idle(struct exchange *x, int64_t ms)
{
	if (!exchange_is_late(x, x->moved + ms))
		return false;
	trace(x, "out of time, waits for %s", exchange_waits(x));
	return true;
}

/* Ends or refuses x if no byte was written for too long; true if so. */
static bool
response_expire(struct exchange *x)
{
	if (!exchange_is_idle(x, options.idle_ms))
		return false;
	x->record.end = END_IDLE;
	if (x->client.out != NULL || answer_is_local(x->request))
		exchange_abort(x, END_IDLE,
		    x->client.out != NULL ? REFUSE_ANSWER_UNREAD : REFUSE_IDLE);
	else
		exchange_refuse(x,
		    x->server.out  ? REFUSE_REQUEST_UNREAD :
			x->up.done ? REFUSE_ANSWER_SLOW :
				     REFUSE_BODY_SLOW,
		    address_words(&x->record.server));
	return true;
}

/* RESPONSE: sends the request's body, waits for a whole response head. */
static bool
response_step(struct exchange *x)
{
	struct conn *c = &x->client, *s = &x->server;
	bool local = answer_is_local(x->request), hangs = bend_hangs(x);
	bool moved = false;
	struct text t;
	size_t skip;
	int n = 0;

	if (hangs)
		moved = !exchange_is_late(x, x->moved + options.idle_ms) &&
		    conn_drain(c);
	else if (s->fd != -1 && !local)
		moved = exchange_pump(x, &x->up, c, s);
	if (c->error || c->write_failed || (c->eof && hangs)) {
		exchange_abort(x, END_CLIENT, REFUSE_NONE);
		return true;
	}
	if (x->up.broken && !local) {
		x->record.end = x->up.cut ? END_CLIENT : END_DONE;
		exchange_refuse(x, exchange_fault(x), "");
		return true;
	}
	if (hangs || !conn_write(c))
		return moved || response_expire(x);
	t = response_begun(s);
	/* An interim response is not delayed, but a 101 is. */
	if (s->in != NULL &&
	    !(t.len >= 12 && t.at[9] == '1' && t.at[11] != '1') &&
	    bend_delays(x))
		return moved;
	skip = buffer_held(s->in) - t.len;
	if (s->in != NULL)
		n = conn_head(s, skip, true);
	if (n > 0) {
		buffer_drop(s->in, skip);
		response_accept(x, (size_t)n - skip);
	} else if (s->in != NULL && head_is_hopeless(s->in))
		exchange_refuse(x, REFUSE_ANSWER_LONG, "");
	else if (s->eof || s->error)
		response_lost(x);
	else
		return conn_read(s) || moved || response_expire(x);
	return true;
}

/* ---- RELAY: the body, or both sides of a tunnel ---- */

/* The client has the whole response: waits for the next request, or closes. */
static void
exchange_finish(struct exchange *x)
{
	bool close = x->close || stop_at;

	exchange_enter(x, close ? PHASE_LINGER : PHASE_REQUEST);
	exchange_release(x);
	exchange_end(x);
	x->served = true;
	if (close)
		conn_shut(&x->client);
}

/* A side of a tunnel has ended, and the other has received all its bytes. */
static void
tunnel_shut(struct exchange *x, struct conn *to, const char *from)
{
	if (!to->shut)
		trace(x, "the %s sends no more; the other side was told", from);
	conn_shut(to);
}

/*
 * Half-closes a tunnel when one of its flows ends; true if the tunnel is over.
 * A FIN from the client ends the flow `up`: when all bytes before the FIN have
 * been written, the server gets a FIN too.  The flow `down` goes on, so that
 * the server can still answer.  A FIN from the server is handled in the same
 * way.  When nothing is left to write then, the idle timeout is HALF_CLOSED_MS,
 * or -t if that is less; the log says `limit`.  If one side resets its
 * connection, the other side first gets the bytes that have arrived, and then a
 * reset.  If these bytes are slow to go, they have HALF_CLOSED_MS in all.
 */
static bool
tunnel_judge(struct exchange *x)
{
	struct conn *c = &x->client, *s = &x->server;

	if (x->record.end == END_DONE)
		x->record.end = c->eof ? END_CLIENT :
		    s->eof             ? END_SERVER :
					 END_DONE;
	if ((conn_is_broken(s) && c->out == NULL && x->down.ready == 0) ||
	    (conn_is_broken(c) && s->out == NULL && x->up.ready == 0)) {
		exchange_abort(x, END_RESET, REFUSE_NONE);
		return true;
	}
	if (x->up.done && s->out == NULL)
		tunnel_shut(x, s, "client");
	if (x->down.done && c->out == NULL)
		tunnel_shut(x, c, "server");
	if (!s->shut || !c->shut)
		return false;
	exchange_close(x, false);
	return true;
}

/*
 * True if the server still reads the request's body after its response: it may
 * want the rest, unless it has refused the request or closed.
 */
static bool
relay_uploads(struct exchange *x)
{
	struct conn *s = &x->server;

	if (!x->request->route.keep || x->record.status >= 300 || x->up.done ||
	    x->up.broken)
		return false;
	/* Nothing may come but its end; with bytes it is not kept. */
	(void)conn_read(s);
	return !s->eof && !s->error && !s->write_failed && !s->hangup;
}

/*
 * The client left, or is cut off: true if the cache wants the fetch.  It then
 * goes on without a client, as after relay_part(): its line is logged now, and
 * no rule bends it.  A body that ends with the connection must not seem
 * complete.
 */
static bool
relay_goes_on(struct exchange *x, enum end end)
{
	if (!cache_wants(x, false))
		return false;
	conn_close(&x->client, x->down.to == FRAMING_CLOSE);
	x->client.exchange = x;
	x->client.eof = true;
	x->refresh = true;
	x->close = true;
	x->record.end = end;
	if (x->record.start) {
		record_exchange(x);
		log_exchange(x);
		trace_end(x);
	}
	x->record.start = 0;
	x->number = 0;
	bend_drop(x);
	/* It goes on, even if nothing moved in this step. */
	exchange_queue(x);
	return true;
}

/*
 * Moves the fetch of x to y: the server connection, the file, and the
 * followers, of which x becomes one.  x reads the payload that it has not
 * passed on yet from fd, the file.
 */
static void
relay_hand_over(struct exchange *x, struct exchange *y, int fd)
{
	struct conn *s = &x->server;
	struct flow *d = &x->down, old = *d;
	struct request *q = x->request;

	if (s->in != NULL)
		buffer_use(&s->in, old.ready);
	tape_cut(x);
	conn_move(s, &y->server, ROLE_SERVER, y);
	y->up = x->up;
	y->down = old;
	y->down.ready = 0;
	y->down.to = FRAMING_CLOSE;
	q->route.keep = false;
	conn_file(s, fd, x);
	flow_start(d, q->body == UINT64_MAX ? FRAMING_CLOSE : FRAMING_LENGTH,
	    old.to, q->body - old.payload);
	d->payload = old.payload;
	d->strips = old.strips;
}

/*
 * x's client is slower than x's followers: the fetch moves to a slot of its
 * own, and x follows it too.  Only if x loses no payload by this.
 */
static void
relay_part(struct exchange *x)
{
	struct exchange *y;
	int fd;

	if (x->request->access.answer != NULL || x->down.broken ||
	    !cache_wants(x, true))
		return;
	y = exchange_take_refresh(x, NULL);
	if (y == NULL)
		return;
	fd = cache_detach(x, y);
	if (fd == -1) {
		exchange_close(y, false);
		return;
	}
	trace(x, "the fetch goes on without this client: it follows, too");
	relay_hand_over(x, y, fd);
	exchange_enter(y, PHASE_RELAY);
}

/*
 * The fetch that x followed was given up, and x has passed on all of it: x
 * sends the request itself, and exchange_skip() drops what its client has.  The
 * rules judged only the address of the leader's server, so they judge the
 * addresses found now.
 */
static void
relay_resume(struct exchange *x)
{
	struct request *q = x->request;

	trace(x, "the fetch that this follows failed: asking the server");
	answer_by(x, ANSWER_NONE);
	access_doubt(x, true);
	q->times.answered = 0;
	route_again(x, PHASE_RESOLVE);
}

/*
 * Ends x if no byte was written for too long; true if so.  The time is shorter
 * for a tunnel if one side has gone, or has ended with nothing left to write.
 */
static bool
relay_expire(struct exchange *x)
{
	const struct conn *c = &x->client, *s = &x->server;
	bool half = x->tunnel &&
	    (conn_is_gone(c) || conn_is_gone(s) || c->write_failed ||
		s->write_failed ||
		((c->eof || s->eof) && c->out == NULL && s->out == NULL));

	if (!exchange_is_idle(x,
		half ? least(HALF_CLOSED_MS, options.idle_ms) :
		       options.idle_ms))
		return false;
	exchange_abort(x,
	    x->tunnel && x->record.end != END_DONE ? END_LIMIT : END_IDLE,
	    x->tunnel          ? REFUSE_NONE :
		c->out != NULL ? REFUSE_ANSWER_UNREAD :
				 REFUSE_IDLE);
	return true;
}

/* RELAY: both flows side by side. */
static bool
relay_step(struct exchange *x)
{
	struct conn *c = &x->client, *s = &x->server;
	bool moved, gone, done;

	moved = exchange_pump(x, &x->down, s, c);
	if (s->fd != -1 && s->role != ROLE_FILE &&
	    exchange_pump(x, &x->up, c, s))
		moved = true;
	/* The rest of the request never comes: the server must not wait. */
	if (x->up.broken && x->up.ready == 0 && s->out == NULL)
		conn_shut(s);
	if (bend_cuts(x)) {
		x->record.rule = x->bend->cut;
		if (x->tunnel || !relay_goes_on(x, END_RULE))
			exchange_abort(x, END_RULE, REFUSE_NONE);
		return true;
	}
	if (x->tunnel)
		return tunnel_judge(x) || moved || relay_expire(x);
	if (c->out != NULL || x->down.ready > 0)
		relay_part(x);
	gone = (c->error || c->write_failed) && !relay_goes_on(x, END_CLIENT);
	done = x->down.done && c->out == NULL && !relay_uploads(x);
	if (gone || (x->refresh && !done && !cache_wants(x, false)))
		exchange_abort(x, END_CLIENT, REFUSE_NONE);
	else if (done)
		exchange_finish(x);
	else if (x->request->answerer == ANSWER_FAILED && !x->down.broken &&
	    !s->readable && s->in == NULL && c->out == NULL)
		relay_resume(x);
	else if ((x->down.broken || s->error) && x->down.ready == 0 &&
	    c->out == NULL)
		exchange_abort(x,
		    x->record.refusal == REFUSE_RULE ? END_RULE :
			x->up.broken                 ? END_CLIENT :
						       END_SERVER,
		    exchange_fault(x));
	else
		return moved || relay_expire(x);
	return true;
}

/* ---- LINGER: until the client has closed ---- */

/*
 * LINGER: reads and drops what the client still sends after the response.
 * On a closed socket it would cause a reset, which could overtake the
 * response (RFC 9112 section 9.6).
 */
static bool
linger_step(struct exchange *x)
{
	struct conn *c = &x->client;
	bool ended = c->eof || c->error ||
	    exchange_is_late(x, x->since + LINGER_ALL_MS);

	if (!ended && conn_drain(c))
		x->moved = now.ms;
	else if (ended || exchange_is_late(x, x->moved + LINGER_MS))
		exchange_close(x, false);
	else
		return false;
	return true;
}

/* ---- all phases: one turn ---- */

/* Asserts most of the invariants of the head comment. */
static void
exchange_check(const struct exchange *x)
{
	const struct conn *const conns[] = { &x->client, &x->server };
	const struct flow *const flows[] = { &x->up, &x->down };
	const struct request *q = x->request;
	size_t i;

	for (i = 0; i < 2; i++) {
		const struct conn *c = conns[i];
		const struct flow *f = flows[i];

		assert(x->phase != PHASE_FREE ||
		    (c->fd == -1 && c->in == NULL && c->out == NULL));
		assert(c->out == NULL ||
		    (buffer_len(c->out) > 0 && c->out->overflow == 0));
		assert(!f->done || (f->whole && f->ready == 0));
		assert(
		    buffer_held(c->in) >= f->ready || x->phase == PHASE_FREE);
	}
	assert(x->client.fd != -1 || x->refresh || x->phase == PHASE_FREE);
	assert(x->server.fd == -1 ||
	    (x->phase >= PHASE_CONNECT && x->phase <= PHASE_RELAY));
	assert(q == NULL || (x->phase != PHASE_FREE && !x->tunnel));
	assert(q != NULL || x->tunnel || x->phase < PHASE_COLLAPSE ||
	    x->phase == PHASE_LINGER);
	assert(q == NULL || q->answerer != ANSWER_FETCH ||
	    x->down.payload + x->down.ready <= q->caching.stored);
}

/*
 * True if x's client has gone.  After a hangup it can't be answered.  After an
 * EOF it may only have half-closed and still wait for the response; but a
 * client that asked for keep-alive does not half-close: it has closed.
 */
static bool
client_is_gone(const struct exchange *x)
{
	const struct request *q = x->request;
	const struct conn *c = &x->client;

	if (x->tunnel)
		return false;
	if (conn_is_gone(c))
		return true;
	return c->eof && c->in == NULL && !x->refresh && x->up.done &&
	    q->kept && !answer_is_local(q);
}

/*
 * While a request is being served, reads ahead one buffer: the client may
 * send its next request, or leave.
 */
static void
exchange_overhear(struct exchange *x)
{
	struct conn *c = &x->client;

	if (x->phase <= PHASE_REQUEST || x->phase == PHASE_LINGER ||
	    bend_hangs(x))
		return;
	if (c->in == NULL && (x->up.done || x->phase < PHASE_RESPONSE))
		(void)conn_read(c);
	if (client_is_gone(x) && !relay_goes_on(x, END_CLIENT))
		exchange_abort(x, END_CLIENT, REFUSE_NONE);
}

/* Bytes read and written so far; what is dropped or stored is only read. */
static uint64_t
exchange_traffic(void)
{
	return totals.received[0] + totals.received[1] + totals.sent[0] +
	    totals.sent[1];
}

/*
 * Runs x until nothing moves or its share of this turn is used up.  Then waits
 * for what its last step or exchange_overhear() tried to read or write, and
 * until it is late.
 */
static void
exchange_run(struct exchange *x)
{
	static bool (*const steps[PHASES])(struct exchange *) = {
		[PHASE_REQUEST] = request_step,
		[PHASE_COLLAPSE] = collapse_step,
		[PHASE_RESOLVE] = resolve_step,
		[PHASE_CONNECT] = connect_step,
		[PHASE_GREET] = greet_step,
		[PHASE_RESPONSE] = response_step,
		[PHASE_RELAY] = relay_step,
		[PHASE_LINGER] = linger_step,
	};
	struct conn *c = &x->client, *s = &x->server;
	const uint64_t most = exchange_traffic() + TURN_BYTES;
	unsigned n = 0;
	bool more;

	do {
		c->wanted = s->wanted = false;
		x->deadline = INT64_MAX;
		more = steps[x->phase] && steps[x->phase](x);
	} while (more && ++n < STEPS_MAX && exchange_traffic() < most);
	exchange_overhear(x);
	exchange_check(x);
	if (x->phase == PHASE_FREE)
		return;
	if (more)
		exchange_queue(x);
	assert(more || x->deadline != INT64_MAX);
	conn_watch(c, conn_events(c));
	conn_watch(s, conn_events(s));
	exchanges.wake = least(exchanges.wake, x->deadline);
}

/* Takes over a new client's fd and serves it; a slot must be free. */
static void
exchange_open(int fd, const struct address *peer, enum arrival arrival)
{
	struct exchange *x = exchange_take();

	assert(x != NULL);
	if (!conn_open(&x->client, ROLE_CLIENT, fd, x)) {
		exchange_close(x, false);
		return;
	}
	x->client.readable = x->client.writable = true;
	x->peer = *peer;
	x->local = peer_is_local(fd, peer);
	x->intercepted = arrival == ARRIVAL_INTERCEPTED;
	x->unnamed = arrival == ARRIVAL_NAMED;
	exchange_enter(x, PHASE_REQUEST);
	exchange_run(x);
}

/* ---- 26. Loop ---- */

/*
 * Waits for events, runs the exchanges concerned, handles deadlines, and
 * accepts clients last.  poll(2) is the only call that may block.  Signals, the
 * command's end, the service manager and the workers are handled here, too.
 *
 * Door: command, hups, lifeline, loop_ask, loop_run, loop_signals, notify,
 * reloading, signal_conn, signals_begin, signals_fork, signals_open,
 * signals_restore, workers_signal.
 */

enum {
	/* Clients accepted at one listener in a turn. */
	ACCEPTS_MAX = 64,
	/* A poll that failed is repeated after this, and an accept. */
	POLL_FAILED_MS = 100,
	ACCEPT_FAILED_MS = 1000,
	/* After this long without an event a descriptor leaves the prefix. */
	COLD_MS = 500,
	/* With this many outside the prefix, or fewer, all are polled. */
	COLD_MIN = 16,
	/* Places outside the prefix that one poll asks. */
	COLD_SLICE = 512,
	/* Such polls take one part in so many of the time, */
	COLD_SHARE = 16,
	/* and ask each place this often, or less while none has an event. */
	COLD_GAP_US = 24000,
	COLD_GAP_MAX_US = 96000,
	/*
	 * After a quiet time of so many us for each of them, the whole set is
	 * polled.  A poll that waits costs about a tenth of that, as it enters
	 * every socket's queue.
	 */
	COLD_QUIET_US = 10,
	/*
	 * If all slots are busy, the next search for an idle one waits this
	 * long, and another ms for every CROWDED_SLOTS slots.
	 */
	CROWDED_MS = 20,
	CROWDED_SLOTS = 1000,
	/* Deadlines may be one ms late for each so many slots. */
	EXPIRE_SLOTS = 1000,
	/* A client counts as silent after this: more than a round trip. */
	SILENT_MS = 1000,
	/* The least time between warnings that all slots are taken. */
	CROWDED_SAY_MS = 60000,
	/* The time that exchanges have to finish after the command ends. */
	COMMAND_DRAIN_MS = 1000,
	/* The time that workers with fewer clients have to take the next. */
	YIELD_MS = 5,
	YIELD_GAP_MS = 50,
	YIELD_FULL_MS = 1000,
	/* The least time between two starts of the same worker. */
	WORKER_GAP_MS = 1000,
	/* The time that a worker has to end when its drain is over. */
	WORKER_KILL_MS = 2000,
	/* How often the supervisor looks whether all have obeyed. */
	WORKER_LOOK_MS = 20,
	/* Bit in a signal's byte: the terminal or the system sent it. */
	SIGNAL_TERMINAL = 128
};

static int64_t accept_after;    /* ms: clients wait until then */
static int64_t crowded_until;   /* ms: no search for a slot until then */
static bool rules_unread;       /* new rules are read, a piece each turn */
static bool kept_heard;         /* a kept connection had an event */
static bool reloading = true;   /* a service manager waits for READY=1 */
static unsigned hups;           /* of the supervisor, at our last SIGHUP */
static struct conn signal_conn; /* the read end of the signal pipe */
static struct conn lifeline;    /* of a worker: see worker_begin() */

/*
 * How long poll may wait: ms to the next deadline, -1 if there is none.  In the
 * first turn not at all.
 */
static int
loop_wait(void)
{
	int64_t wake = exchanges.wake;

	if (names.questions.fd == -1)
		wake = least(wake, names.restart);
	if (exchanges.again != NULL || rules_unread || wake <= now.ms)
		return 0;
	return wake == INT64_MAX ? -1 : (int)least(wake - now.ms, INT_MAX);
}

/* Records the events of the places from first up to end. */
static void
loop_note(size_t first, size_t end)
{
	size_t i;

	for (i = first; i < end; i++) {
		struct conn *c = poll_set.conns[i];
		int events = poll_set.fds[i].revents;

		if (events == 0)
			continue;
		poll_set.fds[i].revents = 0;
		if (events & (POLLHUP | POLLERR | POLLNVAL))
			c->hangup = c->readable = c->writable = true;
		if (events & POLLIN)
			c->readable = true;
		if (events & POLLOUT)
			c->writable = true;
		if (c->exchange != NULL)
			exchange_queue(c->exchange);
		kept_heard = kept_heard || c->role == ROLE_KEPT;
	}
}

/*
 * Polls n places from first on for ms, and notes their events; returns how many
 * there were.  If poll fails, for lack of memory or as the limit on open files
 * was lowered since the start, deadlines and signals are still obeyed.
 */
static int
loop_ask(size_t first, size_t n, int ms)
{
	static bool said;
	int heard = poll(poll_set.fds + first, (nfds_t)n, ms);

	if (heard == -1 && errno != EINTR) {
		if (!said)
			warn("can't poll %lu descriptors: %s", (unsigned long)n,
			    strerror(errno));
		said = true;
		signal_conn.readable = true;
		(void)poll(NULL, 0, POLL_FAILED_MS);
	}
	clock_read();
	if (heard > 0)
		loop_note(first, first + n);
	return heard > 0 ? heard : 0;
}

/*
 * Waits for events.  While there are some, polls the prefix, and what is
 * behind it in slices, so that no turn waits for all.  The next slice is due
 * when COLD_SHARE times the cost of the last has passed, at once if that had
 * an event, and early enough that all of them take COLD_GAP_US.  If none of
 * them had an event, they may take twice as long, up to COLD_GAP_MAX_US.  After
 * a quiet time, polls the whole set, which may block.
 */
static void
loop_poll(void)
{
	static int64_t gap_us = COLD_GAP_US; /* that all slices may take */
	static int64_t due_us;               /* when the next slice is polled */
	static int64_t heard_us;             /* when there was an event */
	static size_t next;                  /* where the next slice begins */
	size_t cold = poll_set.all - poll_set.hot, n;
	int wait = loop_wait(), rest = 0, heard, more;
	int64_t before;

	if (cold <= COLD_MIN ||
	    (wait != 0 && now.us - heard_us > COLD_QUIET_US * (int64_t)cold)) {
		if (loop_ask(0, poll_set.all, wait) > 0)
			heard_us = now.us;
		return;
	}
	if (due_us > now.us)
		rest = (int)((due_us - now.us) / 1000) + 1;
	if (wait >= 0 && wait < rest)
		rest = wait;
	heard = loop_ask(0, poll_set.hot, rest);
	if (now.us >= due_us) {
		if (next < poll_set.hot || next >= poll_set.all) {
			next = poll_set.hot;
			gap_us = least(2 * gap_us, COLD_GAP_MAX_US);
		}
		n = (size_t)least((int64_t)(poll_set.all - next), COLD_SLICE);
		before = now.us;
		more = loop_ask(next, n, 0);
		heard += more;
		next += n;
		due_us = now.us;
		if (more == 0)
			due_us += least(COLD_SHARE * (now.us - before),
			    gap_us * COLD_SLICE / (int64_t)(cold + COLD_SLICE));
		else
			gap_us = COLD_GAP_US / 2;
	}
	if (heard > 0)
		heard_us = now.us;
}

/* Moves descriptors that have been quiet out of the prefix. */
static void
loop_cool(void)
{
	static int64_t cooled;
	size_t i;

	if (now.ms - cooled < COLD_MS)
		return;
	cooled = now.ms;
	for (i = poll_set.hot - 1; i > 0; i--)
		if (poll_set.conns[i]->role != ROLE_OWN &&
		    (uint32_t)now.ms - poll_set.conns[i]->event > COLD_MS)
			poll_cool(poll_set.conns[i]);
}

/* Closes kept connections that had an event or were idle for too long. */
static void
loop_kept(void)
{
	struct other *o;

	kept_heard = false;
	for (o = others; o < others + others_used; o++) {
		int64_t end = o->since_us / 1000 + KEPT_SERVER_MS;

		if (o->conn.fd == -1 || o->conn.role != ROLE_KEPT)
			continue;
		if (o->conn.readable || o->conn.hangup || end <= now.ms)
			conn_close(&o->conn, false);
		else
			exchanges.wake = least(exchanges.wake, end);
	}
}

/* Handles the deadlines that have passed, and finds the next. */
static void
loop_expire(void)
{
	struct exchange *x;
	int64_t soonest;

	if (now.ms < exchanges.wake)
		return;
	exchanges.wake = stop_at ? stop_at : INT64_MAX;
	for (x = exchanges.slots; x < exchanges.slots + exchanges.used; x++) {
		if (x->phase == PHASE_FREE)
			continue;
		if (x->deadline <= now.ms)
			exchange_run(x);
		else
			exchanges.wake = least(exchanges.wake, x->deadline);
	}
	/* With many slots a search takes too long to be done each ms. */
	soonest = now.ms + (int64_t)(exchanges.used / EXPIRE_SLOTS);
	if (exchanges.wake < soonest)
		exchanges.wake = soonest;
	loop_kept();
}

/*
 * Serves the names helper, and starts it again if it has died; queues exchanges
 * that wait for its answers.
 */
static void
loop_names(void)
{
	static bool said;
	struct exchange *x;

	if (names.questions.hangup)
		names_lost();
	if (names.questions.fd == -1 && now.ms >= names.restart) {
		bool failed = !names_start();

		if (failed && !said)
			warn("can't start the helper for names: %s",
			    strerror(errno));
		said = failed;
		names.restart = now.ms + 1000;
		conn_watch(&names.answers, POLLIN);
		names_ask();
	}
	if (names.questions.writable) {
		names.questions.writable = false;
		names_ask();
	}
	if (!names.answers.readable)
		return;
	names.answers.readable = false;
	if (names_take())
		for (x = exchanges.slots; x < exchanges.slots + exchanges.used;
		     x++)
			if (x->phase == PHASE_RESOLVE)
				exchange_queue(x);
}

/*
 * How readily x gives way to a new client.  4: it lingers; 3: it is idle
 * between two requests; 2: it has not sent a byte; 1: it has half-closed and
 * its server is silent; 0: not at all.  All but 3, whose client can reconnect,
 * must have lasted SILENT_MS: a new client is about to send.
 */
static unsigned
loop_rank(const struct exchange *x)
{
	bool waits = x->phase == PHASE_REQUEST && x->record.start == 0 &&
	    !x->refresh;

	if (waits && x->served)
		return 3;
	if (x->phase == PHASE_FREE || now.ms - x->moved < SILENT_MS)
		return 0;
	if (x->phase == PHASE_LINGER)
		return 4;
	if (waits)
		return 2;
	return x->request != NULL && x->client.eof && !x->refresh &&
	    x->up.done && x->record.status == 0 &&
	    !answer_is_local(x->request) && !cache_wants(x, false);
}

/* The exchange of the highest rank, the longest idle among equals; or NULL. */
static struct exchange *
loop_idlest(void)
{
	struct exchange *x, *first = NULL;
	unsigned rank, best = 0;

	for (x = exchanges.slots; x < exchanges.slots + exchanges.used; x++) {
		rank = loop_rank(x);
		if (rank == 0 || rank < best ||
		    (rank == best && x->moved >= first->moved))
			continue;
		first = x;
		best = rank;
	}
	return first;
}

/*
 * All slots are taken, or accept(2) has failed for lack of descriptors or
 * memory (error): if a client waits at l, ends an exchange that may give way;
 * true if so.  If all are busy, the next search waits a while.  The idlest
 * client keeps its slot if it has just sent something.
 */
static bool
loop_make_room(struct listener *l, int error)
{
	static int64_t said;
	size_t busy = exchanges.busy;
	struct exchange *x;

	if (now.ms < crowded_until)
		return false;
	l->conn.readable = fd_is_ready(l->conn.fd, POLLIN);
	if (!l->conn.readable)
		return false;
	exchanges.crowded = true;
	if (said == 0 || now.ms - said >= CROWDED_SAY_MS) {
		said = now.ms;
		warn("%lu of %lu connections are in use (-m, ulimit -n)%s%s: "
		     "idle clients give way, others wait",
		    (unsigned long)busy, (unsigned long)exchanges.n,
		    error ? ", " : "", error ? strerror(error) : "");
	}
	x = loop_idlest();
	if (x == NULL) {
		crowded_until = now.ms + CROWDED_MS +
		    (int64_t)(exchanges.used / CROWDED_SLOTS);
		return false;
	}
	if (x->request != NULL)
		exchange_abort(x, END_LIMIT, REFUSE_NONE);
	else if (!fd_is_ready(x->client.fd, POLLIN))
		exchange_close(x, false);
	else {
		x->client.readable = true;
		exchange_queue(x);
	}
	return exchanges.busy < busy;
}

/*
 * True if the next client is left to another worker, as that has fewer.  All
 * wake up when a client comes, and the first would take most: one connection
 * may have much to do, so clients are spread evenly.  If nobody takes it for
 * YIELD_MS, this worker does.  A full worker first waits until no worker has
 * taken or lost a client for YIELD_FULL_MS: those with room hang.
 */
static bool
loop_yields(void)
{
	static int64_t until, since;
	static uint64_t before;
	uint64_t fewest = exchanges.busy, sum = 0;
	bool full = exchanges.busy == exchanges.n;
	size_t i;

	for (i = 1; i < workers_n; i++) {
		sum += workers[i].totals.busy;
		if (workers[i].pid != 0 && workers[i].totals.busy < fewest)
			fewest = workers[i].totals.busy;
	}
	if (exchanges.busy <= fewest + fewest / 8 + 1 &&
	    (!full || fewest == exchanges.busy))
		return false;
	if (sum != before || now.ms >= until + YIELD_GAP_MS)
		since = now.ms;
	before = sum;
	if (now.ms >= until && now.ms < until + YIELD_GAP_MS &&
	    (!full || now.ms - since >= YIELD_FULL_MS)) {
		until = 0;
		return false;
	}
	if (now.ms >= until)
		until = now.ms + YIELD_MS;
	accept_after = until;
	return true;
}

/*
 * Accepts the clients that wait at l, while there are slots; only one if none
 * came in the turn before, since then nobody else waits, as a rule.  Frees one
 * slot a turn at most, since the search looks at all.
 */
static void
loop_accept(struct listener *l)
{
	unsigned n;

	for (n = 0; n < ACCEPTS_MAX; n++) {
		/* Where an unnamed UNIX socket has no address, it stays. */
		struct sockaddr_storage storage = { .ss_family = AF_UNIX };
		socklen_t len = sizeof(storage);
		struct address peer;
		int fd;

		if (worker > 0 && loop_yields()) {
			l->conn.readable = false;
			return;
		}
		if (exchanges.busy == exchanges.n &&
		    (n > 0 || !loop_make_room(l, 0)))
			return;
		fd = accept(l->conn.fd, (struct sockaddr *)&storage, &len);
		if (fd == -1) {
			l->conn.readable = false;
			/* Who shares it has shut it down: it is not polled. */
			if (l->conn.hangup)
				warn("%s takes no more clients: %s",
				    l->path ? l->path :
					      address_words(&l->address),
				    strerror(errno));
			if ((errno == EMFILE || errno == ENFILE ||
				errno == ENOBUFS || errno == ENOMEM) &&
			    !loop_make_room(l, errno))
				accept_after = now.ms + ACCEPT_FAILED_MS;
			return;
		}
		peer = address_import((struct sockaddr *)&storage);
		exchanges.crowded = false;
		exchange_open(fd, &peer, l->arrival);
		if (!l->busy) {
			l->conn.readable = false;
			return;
		}
	}
}

/* Accepts at all listeners; does not poll them while it can't accept. */
static void
loop_accept_all(void)
{
	int64_t after;
	size_t i;

	for (i = 0; i < listeners_n; i++) {
		struct listener *l = &listeners[i];
		bool waits = l->conn.readable && now.ms >= accept_after;

		if (waits)
			loop_accept(l);
		l->busy = waits;
	}
	after = accept_after;
	if (exchanges.busy < exchanges.n)
		exchanges.crowded = false;
	else if (crowded_until > after)
		after = crowded_until;
	for (i = 0; i < listeners_n; i++)
		conn_watch(&listeners[i].conn, now.ms >= after ? POLLIN : 0);
	if (after > now.ms)
		exchanges.wake = least(exchanges.wake, after);
}

/* USR1: reports one line for each slot in use. */
static void
loop_report(void)
{
	static struct buffer b;
	const struct exchange *x;

	for (x = exchanges.slots; x < exchanges.slots + exchanges.used; x++) {
		const struct conn *c = &x->client, *s = &x->server;

		if (x->phase == PHASE_FREE)
			continue;
		exchange_append(buffer_clear(&b), x);
		warn("%.*s; in buffers: from the client %lu bytes, to it %lu, "
		     "from the server %lu, to it %lu; acts again in %lld s if "
		     "nothing moves",
		    (int)buffer_len(&b), b.data + b.start,
		    (unsigned long)buffer_held(c->in),
		    (unsigned long)buffer_held(c->out),
		    (unsigned long)buffer_held(s->in),
		    (unsigned long)buffer_held(s->out),
		    (long long)(x->again || x->deadline < now.ms ?
			    0 :
			    (x->deadline - now.ms) / 1000));
	}
	warn("%lu of %lu connections in use, %llu exchanges so far",
	    (unsigned long)exchanges.busy, (unsigned long)exchanges.n,
	    (unsigned long long)exchanges.count);
}

/*
 * Tells a service manager that started the proxy about its state, as
 * sd_notify(3) does: a datagram to the socket that NOTIFY_SOCKET names, where
 * `@' stands for the NUL of an abstract name.  If nobody listens, it is lost.
 */
static void
notify(const char *state)
{
	const char *path = getenv("NOTIFY_SOCKET");
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	socklen_t len;
	int fd;

	if (path == NULL || !is_among(*path, "/@") ||
	    !text_copy(text_of(path), un.sun_path, sizeof(un.sun_path)))
		return;
	len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) +
	    strlen(path) + (*path == '/'));
	if (*path == '@')
		un.sun_path[0] = '\0';
	fd = socket(AF_UNIX, SOCK_DGRAM, 0);
	if (fd != -1 && fcntl(fd, F_SETFL, O_NONBLOCK) != -1)
		(void)sendto(fd, state, strlen(state), 0,
		    (struct sockaddr *)&un, len);
	fd_drop(&fd);
}

/*
 * Closes a listener.  Removes the file of a UNIX socket, if it is still this
 * one's: another proxy may listen there by now.
 */
static void
listener_close(struct listener *l)
{
	struct stat status;

	if (l->conn.fd != -1 && l->path != NULL && worker == 0 &&
	    lstat(l->path, &status) != -1 && status.st_dev == l->device &&
	    status.st_ino == l->file)
		(void)unlink(l->path);
	conn_close(&l->conn, false);
}

/* Stops accepting and gives exchanges drain_ms; after a second call none. */
static void
loop_stop(int64_t drain_ms)
{
	struct exchange *x;
	size_t i;

	if (stop_at)
		drain_ms = 0;
	else
		notify("STOPPING=1");
	stop_at = now.ms + drain_ms;
	exchanges.wake = now.ms;
	for (i = 0; i < listeners_n; i++)
		listener_close(&listeners[i]);
	for (x = exchanges.slots; x < exchanges.slots + exchanges.used; x++)
		if (x->phase == PHASE_LINGER ||
		    (x->phase == PHASE_REQUEST && x->record.start == 0))
			exchange_close(x, false);
}

/* The command that the proxy runs, and with which it ends. */
static struct {
	pid_t pid;       /* 0: not running */
	int status;      /* exit status of the proxy after its end */
	int standard[2]; /* its standard output and error; see logs_begin() */
	struct rlimit files; /* its limits on open files */
} command = { .standard = { -1, -1 },
	.files = { RLIM_INFINITY, RLIM_INFINITY } };

/*
 * HUP: reopens the log and the recording, rereads the rules; keeps the old on
 * failure.  Stops if the terminal has gone.
 */
static void
loop_reload(void)
{
	const char *why;
	char state[80];

	/* A command has got the signal as well; the proxy waits for its end. */
	if (logs.terminal && !isatty(STDOUT_FILENO) && !isatty(STDERR_FILENO)) {
		if (command.pid == 0)
			loop_stop(DRAIN_MS);
		return;
	}
	(void)snprintf(state, sizeof(state), "RELOADING=1\nMONOTONIC_USEC=%lld",
	    (long long)now.us);
	notify(state);
	reloading = true;
	hups = workers[0].hups;
	logs.quiet = worker > 0;
	(void)rules_read();
	logs.quiet = false;
	if (!log_open())
		warn("can't reopen the log %s: %s", options.log,
		    strerror(errno));
	why = options.record ? record_open() : NULL;
	if (why != NULL)
		warn("can't open %s again: %s", options.record, why);
}

/* The command has ended: ends the proxy with its exit status. */
static void
command_ended(int status)
{
	command.pid = 0;
	command.status = WIFEXITED(status) ? WEXITSTATUS(status) :
					     128 + WTERMSIG(status);
	if (!stop_at)
		loop_stop(COMMAND_DRAIN_MS);
}

/*
 * The handler of all signals: writes a byte to the loop, with SIGNAL_TERMINAL
 * in it if no process sent the signal.  A worker obeys its supervisor only:
 * what a terminal or a service manager sends to all, it gets from there.
 */
static void
signal_note(int number, siginfo_t *info, void *context)
{
	int saved = errno;
	unsigned char byte = (unsigned char)number;

	(void)context;
	if (worker > 0 && number != SIGCHLD && info->si_pid != workers[0].pid)
		return;
	if (info->si_code > 0)
		byte |= SIGNAL_TERMINAL;
	(void)fd_write(signal_pipe[1], &byte, 1);
	errno = saved;
}

/* The signals whose effect is changed: the first are caught, others ignored. */
static const int signals_changed[] = { SIGHUP, SIGUSR1, SIGTERM, SIGINT,
	SIGCHLD, SIGPIPE, SIGXFSZ };

enum {
	SIGNALS = sizeof(signals_changed) / sizeof(signals_changed[0]),
	SIGNALS_CAUGHT = SIGNALS - 2,
	/* What others may send to the proxy while it starts. */
	SIGNALS_EARLY = 2
};

/* What the proxy was started with. */
static struct sigaction signals_given[SIGNALS];
static sigset_t signals_blocked;

/*
 * Before the slow part of the start: ignores HUP and USR1, which would end the
 * program, and unblocks all signals.
 */
static void
signals_begin(void)
{
	sigset_t none;
	size_t i;

	(void)sigemptyset(&none);
	(void)sigprocmask(SIG_SETMASK, &none, &signals_blocked);
	for (i = 0; i < SIGNALS; i++) {
		(void)sigaction(signals_changed[i], NULL, &signals_given[i]);
		if (i < SIGNALS_EARLY)
			(void)signal(signals_changed[i], SIG_IGN);
	}
}

/* A pipe for the signals, and their handlers; none is blocked then. */
static void
signals_open(void)
{
	struct sigaction action;
	size_t i;

	if (!pipe_open(signal_pipe) ||
	    fcntl(signal_pipe[1], F_SETFL, O_NONBLOCK) == -1 ||
	    !conn_open(&signal_conn, ROLE_OWN, signal_pipe[0], NULL))
		die("no pipe for signals: %s", strerror(errno));
	memset(&action, 0, sizeof(action));
	(void)sigemptyset(&action.sa_mask);
	action.sa_sigaction = signal_note;
	action.sa_flags = SA_SIGINFO | SA_NOCLDSTOP;
	for (i = 0; i < SIGNALS_CAUGHT; i++)
		(void)sigaction(signals_changed[i], &action, NULL);
	for (; i < SIGNALS; i++)
		(void)signal(signals_changed[i], SIG_IGN);
	(void)sigprocmask(SIG_SETMASK, &action.sa_mask, NULL);
}

/*
 * Forks as fork(2) does, with all signals blocked.  In the child they stay
 * blocked until it has set its own handlers: those of its parent would write to
 * the parent's pipe.
 */
static pid_t
signals_fork(void)
{
	sigset_t all, before;
	pid_t pid;

	(void)sigfillset(&all);
	(void)sigprocmask(SIG_BLOCK, &all, &before);
	pid = fork();
	if (pid != 0)
		(void)sigprocmask(SIG_SETMASK, &before, NULL);
	return pid;
}

/* In a child that becomes another program: signals as the proxy got them. */
static void
signals_restore(void)
{
	size_t i;

	for (i = 0; i < SIGNALS; i++)
		(void)sigaction(signals_changed[i], &signals_given[i], NULL);
	(void)sigprocmask(SIG_SETMASK, &signals_blocked, NULL);
}

/* The supervisor sends a signal to all workers. */
static void
workers_signal(int number)
{
	size_t i;

	for (i = 1; i < workers_n && worker == 0; i++)
		if (workers[i].pid != 0)
			(void)kill(workers[i].pid, number);
}

/* The supervisor prints why worker i has ended. */
static void
worker_ended(size_t i, int status)
{
	struct totals *t = &workers[i].totals;
	long pid = (long)workers[i].pid;
	int n = WIFSIGNALED(status) ? WTERMSIG(status) : 0;

	workers[i].pid = 0;
	t->busy = t->slots = t->buffers = 0;
	t->descriptors = t->names_waiting = 0;
	if (!stop_at || n != 0)
		warn("worker %lu, process %ld, has ended: %s, %s %d%s",
		    (unsigned long)i, pid, n ? strsignal(n) : "exit",
		    n ? "signal" : "status", n ? n : WEXITSTATUS(status),
		    stop_at ? "" : "; another is started");
}

/*
 * The first process reaps all that have ended.  As process 1 of a container it
 * also has what others leave behind.
 */
static void
loop_reap(void)
{
	pid_t pid;
	int status;
	size_t i;

	while (worker == 0 && (pid = waitpid(-1, &status, WNOHANG)) > 0) {
		for (i = 1; i < workers_n && workers[i].pid != pid;)
			i++;
		if (pid == command.pid)
			command_ended(status);
		else if (i < workers_n)
			worker_ended(i, status);
	}
}

/*
 * Does what a signal asks for; a supervisor passes it on to the workers.  INT
 * and TERM go to the command, for whose end the proxy waits, unless a terminal
 * has sent them to both.
 */
static void
loop_signal(int number, bool terminal)
{
	if (number == SIGUSR1) {
		if (workers_n == 1 || worker > 0)
			loop_report();
	} else if (number == SIGHUP) {
		workers[0].hups += worker == 0;
		loop_reload();
		if (stop_at)
			number = SIGTERM;
	} else if (number == SIGCHLD) {
		loop_reap();
		return;
	} else if (command.pid == 0)
		loop_stop(DRAIN_MS);
	else if (!terminal)
		(void)kill(command.pid, number);
	workers_signal(number);
}

/* Handles the signals that came: a byte for each, see signal_note(). */
static void
loop_signals(void)
{
	unsigned char signals[16];
	ssize_t n, i;

	if (lifeline.readable) {
		warn("the supervisor of all workers has died: this one ends");
		conn_close(&lifeline, false);
		loop_stop(DRAIN_MS);
	}
	if (!signal_conn.readable)
		return;
	signal_conn.readable = false;
	n = fd_read(signal_conn.fd, signals, sizeof(signals));
	for (i = 0; i < n; i++)
		loop_signal(signals[i] & ~SIGNAL_TERMINAL,
		    signals[i] & SIGNAL_TERMINAL);
}

/*
 * Reads new rules, as long as a turn may take.  A worker prints nothing about
 * them: its supervisor reads the same.
 */
static void
loop_rules(void)
{
	logs.quiet = worker > 0;
	rules_unread = rules_step();
	logs.quiet = false;
	if (rules_unread)
		return;
	workers[worker].hups = hups;
	if (reloading)
		notify("READY=1");
	reloading = false;
}

/* Runs the exchanges that are queued. */
static void
loop_exchanges(void)
{
	struct exchange *x = exchanges.again, *next;

	exchanges.again = NULL;
	for (; x != NULL; x = next) {
		next = x->next_again;
		x->again = false;
		exchange_run(x);
	}
}

/*
 * Serves until told to stop and the last exchange is done or out of time; with
 * -i, until the client is served.
 */
static void
loop_run(void)
{
	struct exchange *x;

	/* Some may have ended before their signal was caught. */
	loop_reap();
	while (stop_at ? exchanges.busy > 0 && now.ms < stop_at :
			 !options.inetd || exchanges.busy > 0) {
		if (worker > 0)
			totals_show();
		loop_poll();
		if (kept_heard)
			loop_kept();
		loop_signals();
		loop_rules();
		loop_names();
		loop_exchanges();
		loop_expire();
		loop_accept_all();
		loop_cool();
		store_sweep();
		log_flush();
		if (buffer_len(&log_lines) > 0)
			exchanges.wake = least(exchanges.wake, now.ms + 1000);
	}
	for (x = exchanges.slots; x < exchanges.slots + exchanges.used; x++)
		if (x->phase != PHASE_FREE)
			exchange_abort(x, END_STOP, REFUSE_NONE);
	log_end();
}

/* ---- 27. Workers ---- */

/*
 * With -j, the program becomes a supervisor that serves nobody, and forks
 * workers, which are whole proxies: each has its own loop, slots, kept
 * connections and names helper.  The supervisor replaces those that die, and
 * passes signals on.  It keeps the bound sockets open for workers that start
 * later, and never polls them.  It obeys SIGHUP, too, so that those workers
 * have the rules and the log now in force.
 *
 * Door: workers_run.
 */

/*
 * In a new process: makes it worker i.  The supervisor holds the other end of
 * the pipe `lives`, and writes nothing to it.
 */
static void
worker_begin(size_t i, const int lives[2])
{
	worker = (unsigned)i;
	workers[i].pid = getpid();
	workers[i].hups = hups;
	totals = workers[i].totals;
	conn_close(&signal_conn, false);
	(void)close(signal_pipe[1]);
	(void)close(lives[1]);
	(void)unsetenv("NOTIFY_SOCKET");
	signals_open();
	if (!conn_open(&lifeline, ROLE_OWN, lives[0], NULL))
		die("no pipe from the supervisor: %s", strerror(errno));
	conn_watch(&lifeline, POLLIN);
}

/* Starts worker i; true in it.  A failure is said once, until one starts. */
static bool
worker_start(size_t i, const int lives[2])
{
	static bool said;
	pid_t pid;

	workers[i].due = now.ms + WORKER_GAP_MS;
	pid = signals_fork();
	if (pid == 0)
		worker_begin(i, lives);
	else if (pid != -1)
		workers[i].pid = pid;
	else if (!said)
		warn("can't start worker %lu: %s", (unsigned long)i,
		    strerror(errno));
	said = pid == -1;
	return pid == 0;
}

/*
 * Starts the workers that are missing; tells a service manager when all have
 * obeyed.  Returns when to do it again: ms, or 0 in a new worker, or -1 if all
 * workers have ended, as they were told.
 */
static int64_t
workers_step(const int lives[2])
{
	int64_t wake = INT64_MAX;
	bool some = false, obeyed = true;
	size_t i;

	for (i = 1; i < workers_n; i++) {
		struct worker *w = &workers[i];

		if (w->pid == 0 && !stop_at && w->due <= now.ms &&
		    worker_start(i, lives))
			return 0;
		if (w->pid == 0)
			wake = least(wake, w->due);
		some = some || w->pid != 0;
		obeyed = obeyed && w->hups == workers[0].hups;
	}
	if (reloading && obeyed)
		notify("READY=1");
	reloading = reloading && !obeyed;
	if (stop_at && now.ms - stop_at >= WORKER_KILL_MS)
		workers_signal(SIGKILL);
	if (reloading || stop_at)
		wake = now.ms + WORKER_LOOK_MS;
	return stop_at && !some ? -1 : wake;
}

/*
 * Starts all workers, and returns in each of them.  Their supervisor waits for
 * signals and replaces those that die, until the program ends.
 */
static void
workers_run(void)
{
	int lives[2];
	int64_t wake;

	if (!pipe_open(lives))
		die("no pipe for workers: %s", strerror(errno));
	conn_watch(&signal_conn, POLLIN);
	while ((wake = workers_step(lives)) > 0) {
		wake = wake > now.ms ? least(wake - now.ms, INT_MAX) : 0;
		(void)loop_ask(0, poll_set.all, (int)wake);
		loop_signals();
		while (rules_step())
			continue;
	}
	if (wake == -1)
		exit(0);
	if (!names_start())
		die("no helper for names: %s", strerror(errno));
}

/* ---- 28. Options and listeners ---- */

/*
 * Reads the command line and opens the sockets that it asks for, or takes those
 * that a service manager gave.
 *
 * Door: inetd_take, listen_all, listen_inherit, option_help, option_version,
 * options_parse.
 */

enum {
	/* An address that the machine does not have yet is tried so often. */
	LISTEN_AGAIN_MS = 200
};

/* What the target of an option becomes. */
enum option_kind {
	OPTION_COUNT,   /* how often it was given; it has no argument */
	OPTION_NAME,    /* its argument; the last one counts */
	OPTION_ADDRESS, /* two of them: for IPv4, and for IPv6 */
	OPTION_MORE,    /* all its arguments */
	OPTION_SOURCE,  /* all those of -e and -f together; no target */
	OPTION_NUMBER,  /* a number, from `least' to `most' */
	OPTION_SIZE     /* a number of bytes, or of K, M, G */
};

/* An option: a row of option_table. */
struct option {
	char letter;
	char argument[10]; /* as -h names it, or "": it has none */
	char help[64];     /* one line */
	enum option_kind kind;
	void *target;         /* a member of `options` */
	uint64_t least, most; /* of a number */
};

/*
 * A new option is a row here, a member of `options` and its use, and its text
 * in proxy.1, there in SYNOPSIS too.  One that stands for a rule is used in
 * options_read().
 */
static const struct option option_table[] = {
	{ 'a', "", "tell servers nothing about the client or the proxy",
	    OPTION_COUNT, &options.anonymous, 0, 0 },
	{ 'b', "address", "connect to servers from this address",
	    OPTION_ADDRESS, options.from, 0, 0 },
	{ 'c', "directory", "cache responses in this directory", OPTION_NAME,
	    &options.cache, 0, 0 },
	{ 'e', "rule", "add a rule", OPTION_SOURCE, NULL, 0, 0 },
	{ 'f', "file", "add the rules of a file", OPTION_SOURCE, NULL, 0, 0 },
	{ 'h', "", "print this and exit", OPTION_COUNT, &options.help, 0, 0 },
	{ 'i', "", "serve the client that is standard input, and exit",
	    OPTION_COUNT, &options.inetd, 0, 0 },
	{ 'j', "n", "serve with n processes", OPTION_NUMBER, &options.workers,
	    1, WORKERS_MAX },
	{ 'k', "url", "print the paths of a URL's cache entries and exit",
	    OPTION_NAME, &options.key, 0, 0 },
	{ 'l', "address",
	    "listen on [host:]port or /path; intercept: or proxy: before it",
	    OPTION_MORE, &options.listen, 0, 0 },
	{ 'm', "n", "serve at most n clients at once", OPTION_NUMBER,
	    &options.connections, 1, CONNECTIONS_MAX },
	{ 'n', "", "check options and rules and exit", OPTION_COUNT,
	    &options.check, 0, 0 },
	{ 'o', "file", "append the log to a file, - or syslog", OPTION_NAME,
	    &options.log, 0, 0 },
	{ 's', "size", "limit the cache to a size such as 500M", OPTION_SIZE,
	    &options.cache_size, 0, 0 },
	{ 'S', "n", "seed the random choices of rules, to repeat them",
	    OPTION_NUMBER, &options.seed, 1, INT32_MAX },
	{ 't', "seconds", "close a connection after so long without a byte",
	    OPTION_NUMBER, &options.idle_s, 1, 1000000000 },
	{ 'T', "url", "print what the rules decide about a URL and exit",
	    OPTION_MORE, &options.trials, 0, 0 },
	{ 'u', "user", "become this user once the sockets are open",
	    OPTION_NAME, &options.user, 0, 0 },
	{ 'V', "", "print the version and the limits and exit", OPTION_COUNT,
	    &options.version, 0, 0 },
	{ 'v', "", "trace each request; twice: its payload, too", OPTION_COUNT,
	    &options.verbose, 0, 0 },
	{ 'w', "file", "record all exchanges in a file, in the format HAR",
	    OPTION_NAME, &options.record, 0, 0 },
	{ 'x', "url", "send everything through the proxy http:// or socks5://",
	    OPTION_NAME, &options.via, 0, 0 },
};

enum {
	OPTIONS = sizeof(option_table) / sizeof(option_table[0])
};

/* -h: a line for each option. */
static void
option_help(void)
{
	size_t i;

	printf("usage: proxy [option ...] [-- command [argument ...]]\n\n");
	for (i = 0; i < OPTIONS; i++)
		printf("  -%c %-10s %s\n", option_table[i].letter,
		    option_table[i].argument, option_table[i].help);
}

/* -V: the version, and the limits of this build. */
static void
option_version(void)
{
	printf("proxy " VERSION "\nbuffer %d\nhead %d\nline %d\nfields %d\n"
	       "slot %lu\nhead-ms %d\nconnect-ms %d\nidle-ms %d\n"
	       "half-closed-ms %d\nkept-client-ms %d\nkept-server-ms %d\n"
	       "collapse-ms %d\nlinger-ms %d\ndrain-ms %d\nname-ms %d\n"
	       "name-failed-ms %d\n",
	    BUFFER_SIZE, BUFFER_ROOM - CHUNK_ROOM - TAIL_ROOM, LINE_MAX_BYTES,
	    FIELDS_MAX, (unsigned long)sizeof(struct exchange), HEAD_MS,
	    CONNECT_MS, IDLE_MS, HALF_CLOSED_MS, KEPT_CLIENT_MS, KEPT_SERVER_MS,
	    COLLAPSE_MS, LINGER_MS, DRAIN_MS, NAME_KEPT_MS, NAME_FAILED_MS);
}

/* A copy of an argument, which may be overwritten. */
static const char *
option_copy(const char *argument)
{
	char *copy = strdup(argument);

	if (copy == NULL)
		die("no memory");
	return copy;
}

/* Sets the target of an option. */
static void
option_set(const struct option *o, const char *argument)
{
	unsigned *count = o->target;
	const char **name = o->target;
	struct strings *more = o->target;
	uint64_t *number = o->target;

	switch (o->kind) {
	case OPTION_COUNT:
		++*count;
		break;
	case OPTION_NAME:
		*name = option_copy(argument);
		break;
	case OPTION_ADDRESS:
		name[strchr(argument, ':') != NULL] = argument;
		break;
	case OPTION_MORE:
		if (more->n == SOURCES_MAX)
			usage("-%c: %d times at most", o->letter, SOURCES_MAX);
		more->at[more->n++] = argument;
		break;
	case OPTION_SOURCE:
		if (options.sources_n == SOURCES_MAX)
			usage("-e and -f: %d times at most", SOURCES_MAX);
		options.sources[options.sources_n].line = o->letter == 'e';
		options.sources[options.sources_n++].at = option_copy(argument);
		break;
	case OPTION_NUMBER:
		if (!number_parse(text_of(argument), o->most, number) ||
		    *number < o->least)
			usage("-%c %s: not a number from %llu to %llu",
			    o->letter, argument, (unsigned long long)o->least,
			    (unsigned long long)o->most);
		break;
	case OPTION_SIZE:
		if (!size_parse(text_of(argument), number) || *number == 0)
			usage("-%c %s: not a size such as 500M", o->letter,
			    argument);
	}
}

/*
 * Takes the option of that letter; an error if there is none.  The password in
 * a rule or the URL of a parent is overwritten where it came from: the list of
 * processes would show it.
 */
static void
option_take(int letter, char *argument)
{
	const struct option *o = option_table;

	while (o < option_table + OPTIONS && o->letter != letter)
		o++;
	if (letter == ':')
		usage("-%c needs an argument", optopt);
	if (o == option_table + OPTIONS) {
		usage("no option -%c", optopt);
		return;
	}
	option_set(o, argument);
	if (letter == 'e' || letter == 'x')
		secret_hide_string(argument);
}

/* Reads the command line into `options`; if it is wrong, exits with 2. */
static void
options_parse(int argc, char **argv)
{
	char letters[2 * OPTIONS + 2] = ":";
	int letter;
	size_t i, n = 1;

	for (i = 0; i < OPTIONS; i++) {
		letters[n++] = option_table[i].letter;
		if (option_table[i].argument[0] != '\0')
			letters[n++] = ':';
	}
	letters[n] = '\0';
	opterr = 0;
	while ((letter = getopt(argc, argv, letters)) != -1)
		option_take(letter, optarg);
	if (optind > 1 && strcmp(argv[optind - 1], "--") == 0) {
		options.command = argv + optind;
		if (optind == argc)
			usage("--: a command must follow");
	} else if (optind < argc)
		usage("%s: not an option; a command stands behind --",
		    argv[optind]);
	if (options.cache_size != 0 && options.cache == NULL)
		usage("-s: there is no cache without -c directory");
	if (options.workers > 1 &&
	    (options.inetd || options.command || options.record))
		usage("-j: several processes can't %s",
		    options.inetd       ? "serve the one client of -i" :
			options.command ? "end with the command behind --" :
					  "write the one recording of -w");
	if (options.cache_size == 0)
		options.cache_size = (uint64_t)CACHE_MIB << 20;
	if (options.idle_s != 0)
		options.idle_ms = (int64_t)options.idle_s * 1000;
	if (options.seed == 0)
		options.seed = (uint64_t)now.us ^ (uint64_t)getpid() << 32;
	/* Mixed: the next seed does not make the same choices later. */
	options.seed = random_mix(options.seed);
}

/* Accepts at fd, a listening socket; returns 0, or an errno. */
static int
listener_keep(int fd, const char *path)
{
	struct listener *l = &listeners[listeners_n];
	struct stat status;
	int only = 1;
	socklen_t len = sizeof(only);

	if (listeners_n == LISTENERS_MAX)
		die("too many listening addresses: %d at most", LISTENERS_MAX);
	if (!conn_open(&l->conn, ROLE_OWN, fd, NULL))
		return errno;
	l->path = path;
	if (path != NULL && lstat(path, &status) != -1) {
		l->device = status.st_dev;
		l->file = status.st_ino;
	}
	l->address = address_bound(fd);
	l->both = l->address.family == AF_INET6 &&
	    address_is_any(&l->address) &&
	    getsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, &len) != -1 &&
	    !only;
	listeners_n++;
	return 0;
}

/* Adds a listening socket; returns 0, or an errno. */
static int
listener_add(const struct sockaddr *at, socklen_t len, const char *path)
{
	int fd = socket(at->sa_family, SOCK_STREAM, 0), on = 1;

	if (fd == -1)
		return errno;
	(void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (at->sa_family == AF_INET6)
		(void)setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on,
		    sizeof(on));
	if (bind(fd, at, len) != -1 && listen(fd, SOMAXCONN) != -1)
		return listener_keep(fd, path);
	fd_drop(&fd);
	return errno;
}

/* Ends the program: it can't listen at a place; advice if that is in use. */
static void
listen_die(const char *argument, int error, const char *advice)
{
	die("can't listen on %s: %s%s", argument, strerror(error),
	    error == EADDRINUSE ? advice : "");
}

/*
 * Listens on a UNIX socket; removes one that a dead proxy has left behind.
 * With -n, this and listen_at() only look at what they are given.
 */
static void
listen_path(const char *path)
{
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	struct stat status;
	int fd, error;

	if (!text_copy(text_of(path), un.sun_path, sizeof(un.sun_path)))
		usage("-l %s: a path of %lu bytes at most", path,
		    (unsigned long)sizeof(un.sun_path) - 1);
	if (options.check)
		return;
	fd = socket(AF_UNIX, SOCK_STREAM, 0);
	if (fd != -1 && fcntl(fd, F_SETFL, O_NONBLOCK) != -1 &&
	    lstat(path, &status) != -1 && S_ISSOCK(status.st_mode) &&
	    connect(fd, (struct sockaddr *)&un, sizeof(un)) == -1 &&
	    errno == ECONNREFUSED)
		(void)unlink(path);
	fd_drop(&fd);
	error = listener_add((struct sockaddr *)&un, sizeof(un), path);
	if (error != 0)
		listen_die(path, error, "; try another path with -l");
}

/* Listens at an address; returns 0, or an errno. */
static int
listen_address(const struct address *a)
{
	struct sockaddr_storage storage;
	socklen_t len = address_export(a, &storage);

	return listener_add((struct sockaddr *)&storage, len, NULL);
}

/*
 * Listens at all addresses of a host.  With port 0, all use the port that the
 * first gets.  Returns 0, or if there is none, an errno: that of a missing IPv6
 * only if nothing else is wrong.
 */
static int
listen_found(const struct addrinfo *found, uint16_t port)
{
	const struct addrinfo *at;
	size_t before = listeners_n;
	int error = EADDRNOTAVAIL;
	bool worse = false;

	for (at = found; at != NULL; at = at->ai_next) {
		struct address a = address_import(at->ai_addr);
		bool missing;
		int why;

		a.port = port == 0 && listeners_n > before ?
		    listeners[before].address.port :
		    port;
		why = listen_address(&a);
		missing = why == EAFNOSUPPORT || why == EADDRNOTAVAIL;
		if (why == 0 || (missing && worse))
			continue;
		error = why;
		worse = !missing;
		/* If it is the only one, the caller reports it. */
		if (worse && found->ai_next != NULL)
			warn("not listening on %s: %s", address_words(&a),
			    strerror(why));
	}
	return listeners_n > before ? 0 : error;
}

/*
 * Listens at [host:]port or a path; ends the program if none can be bound.  For
 * an address that the machine does not have yet, as while it boots, it waits.
 */
static void
listen_at(const char *argument)
{
	struct addrinfo hints = { .ai_flags = AI_PASSIVE,
		.ai_socktype = SOCK_STREAM };
	struct addrinfo *found = NULL;
	struct address six;
	const char *colon = strrchr(argument, ':');
	struct text t = text_of("127.0.0.1");
	char host[HOST_MAX + 1];
	bool any, bracketed;
	uint64_t port = 0;
	int ms = 0, error;

	if (strchr(argument, '/') != NULL) {
		listen_path(argument);
		return;
	}
	if (colon != NULL)
		t = text_cut(argument, (size_t)(colon - argument));
	any = t.len == 0 || text_is(t, "*");
	bracketed = t.len > 1 && *t.at == '[' && t.at[t.len - 1] == ']';
	if (bracketed)
		t = text_cut(t.at + 1, t.len - 2);
	if (!number_parse(text_of(colon ? colon + 1 : argument), 65535,
		&port) ||
	    (!any && !host_is_valid(t, bracketed)))
		usage("-l %s: not [host:]port", argument);
	if (options.check)
		return;
	(void)text_copy(t, host, sizeof(host));
	error = getaddrinfo(any ? NULL : host, "0", &hints, &found);
	if (error != 0)
		die("can't listen on %s: %s", argument, gai_strerror(error));
	while ((error = listen_found(found, (uint16_t)port)) == EADDRNOTAVAIL &&
	    ms < LISTEN_RETRY_MS) {
		if (ms == 0)
			warn("waiting for the address %s", argument);
		(void)poll(NULL, 0, LISTEN_AGAIN_MS);
		ms += LISTEN_AGAIN_MS;
	}
	freeaddrinfo(found);
	if (error != 0)
		listen_die(argument, error, "; try another port with -l");
	if (colon != NULL || listeners_n == LISTENERS_MAX)
		return;
	port = listeners[listeners_n - 1].address.port;
	if (address_parse(text_of("::1"), (unsigned)port, &six) &&
	    listen_address(&six) == EADDRINUSE)
		warn("not listening on %s: %s", address_words(&six),
		    strerror(EADDRINUSE));
}

/* One -l: an address as listen_at() takes it, or one behind a word. */
static void
listen_on(const char *argument)
{
	static const char *const words[] = { [ARRIVAL_CLIENT] = "",
		[ARRIVAL_INTERCEPTED] = "intercept:",
		[ARRIVAL_NAMED] = "proxy:" };
	size_t first = listeners_n, i = sizeof(words) / sizeof(words[0]) - 1;

	while (i > 0 && !text_starts(text_of(argument), words[i]))
		i--;
	listen_at(argument + strlen(words[i]));
	for (; first < listeners_n; first++)
		listeners[first].arrival = (enum arrival)i;
}

/*
 * Listens on the sockets that a service manager passes on, as sd_listen_fds(3)
 * has it: from descriptor 3 on, if LISTEN_PID is this process.
 */
static void
listen_inherit(void)
{
	const char *pid = getenv("LISTEN_PID"), *fds = getenv("LISTEN_FDS");
	uint64_t owner = 0, n = 0;
	int fd;

	if (pid != NULL && fds != NULL &&
	    number_parse(text_of(pid), INT32_MAX, &owner) &&
	    owner == (uint64_t)getpid() &&
	    !number_parse(text_of(fds), LISTENERS_MAX, &n))
		die("LISTEN_FDS: %.40s is not a number up to %d", fds,
		    LISTENERS_MAX);
	for (fd = STDERR_FILENO + 1; fd <= STDERR_FILENO + (int)n; fd++) {
		int accepts = 1, error = 0;
		socklen_t len = sizeof(accepts);

		if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &accepts, &len) ==
		    -1)
			error = errno;
		else if (accepts)
			error = listener_keep(fd, NULL);
		if (error != 0 || !accepts)
			die("LISTEN_FDS: descriptor %d: %s", fd,
			    error ? strerror(error) : "it does not listen");
	}
	(void)unsetenv("LISTEN_PID");
	(void)unsetenv("LISTEN_FDS");
}

/*
 * Listens at the addresses of -l; if there are none, and no socket of a service
 * manager, at the default address.
 */
static void
listen_all(void)
{
	size_t i;

	if (options.listen.n == 0 && listeners_n == 0 && !options.inetd)
		listen_on(options.command ? "127.0.0.1:0" : "8080");
	for (i = 0; i < options.listen.n; i++)
		listen_on(options.listen.at[i]);
}

/*
 * -i: returns the client's socket, taken from standard input, and sets peer.
 * Where standard output and error are the same, nothing but the answer may be
 * written there.
 */
static int
inetd_take(struct address *peer)
{
	struct sockaddr_storage from = { .ss_family = AF_UNIX };
	socklen_t len = sizeof(from), type_len = sizeof(int);
	struct stat client, other;
	int fd = -1, null, i, type = SOCK_STREAM;

	(void)getsockopt(STDIN_FILENO, SOL_SOCKET, SO_TYPE, &type, &type_len);
	if (type != SOCK_STREAM)
		die("-i: standard input is a socket without connections");
	if (getpeername(STDIN_FILENO, (struct sockaddr *)&from, &len) == -1 ||
	    (fd = fcntl(STDIN_FILENO, F_DUPFD, STDERR_FILENO + 1)) == -1)
		die("-i: standard input is no connected socket: %s",
		    strerror(errno));
	*peer = address_import((struct sockaddr *)&from);
	null = open("/dev/null", O_RDWR);
	(void)dup2(null, STDIN_FILENO);
	for (i = STDOUT_FILENO; i <= STDERR_FILENO; i++)
		if (fstat(fd, &client) != -1 && fstat(i, &other) != -1 &&
		    client.st_ino == other.st_ino &&
		    client.st_dev == other.st_dev)
			(void)dup2(null, i);
	fd_drop(&null);
	return fd_note(fd);
}

/* ---- 29. Main: start, a command ---- */

/*
 * Starts all that must be there before the loop runs, answers the options
 * that only print, and runs the command that the proxy was given.
 *
 * Door: main.
 */

/* Answers -h, -V and -k, which need no rules, and ends the program. */
static void
options_answer(void)
{
	struct target target;

	if (options.help)
		option_help();
	else if (options.version)
		option_version();
	else if (options.key == NULL)
		return;
	else if (options.cache == NULL)
		usage("-k needs -c, the directory to look in");
	else if (!url_parse(text_of(options.key), &target) ||
	    target.form != FORM_ABSOLUTE)
		usage("-k %s: not a URL that begins with http://", options.key);
	else
		store_print(&target);
	exit(0);
}

/*
 * Raises the limit of descriptors and allocates the tables.  A slot uses at
 * most two descriptors, one more with a cache and one more with a recording:
 * the limit can't be reached.  Each worker has its share of -m.
 */
static void
tables_open(void)
{
	struct rlimit limit;
	size_t fds = 1024, n, wanted;

	if (getrlimit(RLIMIT_NOFILE, &limit) != -1) {
		command.files = limit;
		limit.rlim_cur = limit.rlim_max;
		(void)setrlimit(RLIMIT_NOFILE, &limit);
		(void)getrlimit(RLIMIT_NOFILE, &limit);
		fds = limit.rlim_cur > DESCRIPTORS_MAX ? DESCRIPTORS_MAX :
							 (size_t)limit.rlim_cur;
	}
	if (fds < DESCRIPTORS_OWN + listeners_n + 8)
		die("only %lu open files allowed", (unsigned long)fds);
	fds -= DESCRIPTORS_OWN + listeners_n;
	others_n = fds / 8 < OTHERS_MAX ? fds / 8 : OTHERS_MAX;
	n = (fds - others_n) /
	    (2U + (options.cache != NULL) + (options.record != NULL));
	wanted = (size_t)(options.connections / options.workers);
	if (options.workers > 1 && wanted < WORKER_CLIENTS)
		wanted = WORKER_CLIENTS;
	exchanges.n = n < wanted ? n : wanted;
	exchanges.slots = calloc(exchanges.n, sizeof(*exchanges.slots));
	others = malloc(others_n * sizeof(*others));
	if (exchanges.slots == NULL || others == NULL ||
	    (options.record != NULL && !record_tables()))
		die("no memory for %lu connections",
		    (unsigned long)exchanges.n);
	if (options.workers > 1) {
		workers_n = (size_t)options.workers + 1;
		workers = memory_share(workers_n * sizeof(*workers));
	}
	workers[0].pid = getpid();
	poll_set_open(
	    2 * exchanges.n + others_n + DESCRIPTORS_OWN + listeners_n);
}

/* Makes our names: the host name, and a pseudonym for Via that hides it. */
static void
pseudonym_make(void)
{
	unsigned long bits = 0;
	int fd = open("/dev/urandom", O_RDONLY);

	if (fd == -1 || fd_read(fd, &bits, sizeof(bits)) == -1 || bits == 0)
		bits = (unsigned long)now.us * 2654435761UL +
		    (unsigned long)getpid();
	fd_drop(&fd);
	(void)snprintf(pseudonym, sizeof(pseudonym), "proxy-%08lx",
	    bits & 0xffffffffUL);
	if (gethostname(host_name, sizeof(host_name) - 1) == -1)
		host_name[0] = '\0';
}

/* Prints the addresses and how to use them. */
static void
banner(void)
{
	const struct address *first = NULL;
	const char *words;
	bool exposed = false;
	size_t i;

	for (i = 0; i < listeners_n; i++) {
		const struct address *a = &listeners[i].address;

		warn("listening on %s",
		    listeners[i].path ? listeners[i].path : address_words(a));
		if (first == NULL && a->family != AF_UNIX &&
		    listeners[i].arrival != ARRIVAL_NAMED)
			first = a;
		exposed = exposed || !address_is_local(a);
	}
	if (first != NULL && options.command == NULL) {
		words = address_words(first);
		warn("  curl -x http://%s http://example.com/", words);
		warn("  export http_proxy=http://%s https_proxy=http://%s",
		    words, words);
	}
	rules_warn(exposed);
}

/*
 * Opens /dev/null for each standard descriptor that is closed: otherwise a
 * client's socket could become the log.  Ends the program if that fails.
 */
static void
standard_open(void)
{
	int fd;

	for (fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
		if (fcntl(fd, F_GETFD) == -1 && open("/dev/null", O_RDWR) != fd)
			die("standard descriptor %d is closed, and /dev/null "
			    "can't be opened: %s",
			    fd, strerror(errno));
}

/*
 * If fd is a terminal, opens it again without blocking: a terminal that is
 * stopped, or that nobody reads, must not stop the proxy.  Other processes
 * that share the old descriptor are not affected.  The same for a pipe to which
 * several workers or a command write, where that is possible: one could fill it
 * just when another has found that there is room.
 */
static void
terminal_open(int fd)
{
	const char *name = isatty(fd) ? ttyname(fd) : NULL;
	struct stat status;
	int terminal = -1;

	if ((options.workers > 1 || options.command != NULL) &&
	    fstat(fd, &status) != -1 && S_ISFIFO(status.st_mode))
		name = fd == STDOUT_FILENO ? "/dev/fd/1" : "/dev/fd/2";
	if (name != NULL)
		terminal = open(name, O_WRONLY | O_NONBLOCK | O_NOCTTY);
	if (terminal == -1)
		return;
	(void)dup2(terminal, fd);
	(void)close(terminal);
}

/*
 * Gives the log to the user of -u, who may have to open it again by HUP.  Not
 * through a link, which that user may have made: it could lead to any file.
 */
static void
logs_own(void)
{
	struct stat named, open;

	if (logs.fd <= STDERR_FILENO || !logs.regular ||
	    fstat(logs.fd, &open) == -1 || open.st_uid == options.uid)
		return;
	if (lstat(options.log, &named) == -1 || named.st_ino != open.st_ino ||
	    named.st_dev != open.st_dev || open.st_nlink != 1)
		warn("the log %s is a link, or has several: it is not given to "
		     "user %s",
		    options.log, options.user);
	else if (fchown(logs.fd, options.uid, options.gid) == -1)
		warn("the log %s can't be given to user %s: %s", options.log,
		    options.user, strerror(errno));
}

/* Opens the log, and looks whether log and trace go to a terminal. */
static void
logs_begin(void)
{
	const char *why;
	int fd;

	log_lines.start = log_lines.end = CHUNK_ROOM;
	for (fd = STDOUT_FILENO; fd <= STDERR_FILENO; fd++) {
		if (options.command != NULL)
			command.standard[fd - STDOUT_FILENO] =
			    fd_note(fcntl(fd, F_DUPFD, STDERR_FILENO + 1));
		terminal_open(fd);
	}
	if (!log_open())
		die("can't open the log %s: %s", options.log, strerror(errno));
	why = options.record ? record_open() : NULL;
	if (why != NULL)
		die("can't record to %s: %s", options.record, why);
	if (options.user != NULL)
		logs_own();
	logs.colour = isatty(STDERR_FILENO) && getenv("NO_COLOR") == NULL;
	logs.terminal = isatty(STDOUT_FILENO) || isatty(STDERR_FILENO);
}

/*
 * In the child that becomes the command: it finds the proxy in its environment
 * and has the descriptors, limits and signals that the proxy was given, but for
 * the sockets of a service manager.
 */
static void
command_run(const char *url)
{
	static const char *const set[] = { "http_proxy", "https_proxy",
		"HTTPS_PROXY", "no_proxy", "NO_PROXY" };
	size_t i;
	int error;

	for (i = 0; i < sizeof(set) / sizeof(set[0]); i++)
		if (setenv(set[i], i < 3 ? url : "", 1) == -1)
			_exit(126);
	signals_restore();
	for (i = 0; i < 2; i++)
		(void)dup2(command.standard[i], STDOUT_FILENO + (int)i);
	(void)unsetenv("NOTIFY_SOCKET");
	(void)setrlimit(RLIMIT_NOFILE, &command.files);
	(void)execvp(options.command[0], options.command);
	error = errno;
	warn("can't run %s: %s", options.command[0], strerror(error));
	_exit(error == ENOENT ? 127 : 126);
}

/*
 * Starts the command.  It reaches the proxy at the first address that wants no
 * PROXY header; an address that stands for all is reached by loopback.
 */
static void
command_start(void)
{
	char url[ADDRESS_TEXT + 8];
	struct address a;
	size_t i = 0;

	while (i < listeners_n &&
	    (listeners[i].address.family == AF_UNIX ||
		listeners[i].arrival == ARRIVAL_NAMED))
		i++;
	if (i == listeners_n)
		die("a command can't use a proxy that listens on a path only, "
		    "or for PROXY headers");
	a = listeners[i].address;
	address_settle(&a);
	(void)snprintf(url, sizeof(url), "http://%s", address_words(&a));
	command.pid = signals_fork();
	if (command.pid == -1)
		die("can't run %s: %s", options.command[0], strerror(errno));
	if (command.pid == 0)
		command_run(url);
}

/* The command has ended: sums up what it did. */
static void
command_end(void)
{
	unsigned long long requests = 0;
	size_t i;

	for (i = 0; i < RESULTS; i++)
		requests += totals.results[i];
	warn("%llu requests, %llu refused or failed, %llu from the cache, "
	     "%llu bytes up, %llu down",
	    requests,
	    requests - (unsigned long long)totals.refusals[REFUSE_NONE],
	    (unsigned long long)totals.results[RESULT_HIT],
	    (unsigned long long)totals.up, (unsigned long long)totals.down);
}

/*
 * The order matters: the names helper is forked before any socket is made, and
 * sockets and the log are opened before root is given up.
 */
int
main(int argc, char **argv)
{
	struct address peer;
	int client = -1;

	standard_open();
	clock_read();
	started = now.ms;
	tzset();
	options_parse(argc, argv);
	options_answer();
	/* Before anything is said: standard error may be the client. */
	if (options.inetd && !options.check && options.trials.n == 0)
		client = inetd_take(&peer);
	if (!options.check && options.trials.n == 0)
		signals_begin();
	if (!rules_read())
		exit(2);
	if (options.user != NULL && options.trials.n == 0)
		user_find(options.user);
	if (options.check)
		listen_all();
	if (options.trials.n > 0)
		rules_try();
	if (options.check)
		exit(0);
	pseudonym_make();
	listen_inherit();
	if (options.workers == 1 && !names_start())
		die("no helper for names: %s", strerror(errno));
	listen_all();
	signals_open();
	logs_begin();
	if (options.cache != NULL)
		store_open();
	if (options.user != NULL)
		user_become();
	tables_open();
	pool_fill(&buffer_pool);
	pool_fill(&request_pool);
	banner();
	if (options.workers > 1)
		workers_run();
	conn_watch(&signal_conn, POLLIN);
	conn_watch(&names.answers, POLLIN);
	if (options.command != NULL)
		command_start();
	if (options.inetd)
		exchange_open(client, &peer, ARRIVAL_CLIENT);
	loop_run();
	if (options.command != NULL)
		command_end();
	return command.status;
}
