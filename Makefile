# proxy: make run, make test, make install. Any make and any C99 compiler do.
.POSIX:

CC = cc
CFLAGS = -O2
CPPFLAGS =
LDFLAGS =
PREFIX = /usr/local
DESTDIR =
TESTS =

BIN = $(DESTDIR)$(PREFIX)/bin
MAN = $(DESTDIR)$(PREFIX)/share/man/man1

# What test.sh builds proxy.c with, for the suite and for the measurements.
BUILD = CC='$(CC)' CFLAGS='$(CPPFLAGS) $(CFLAGS) $(LDFLAGS)'

all: proxy

proxy: proxy.c
	$(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) -o $@ proxy.c

run: proxy
	./proxy

run-cache: proxy
	./proxy -c cache

test:
	$(BUILD) sh test.sh $(TESTS)

bench:
	$(BUILD) sh test.sh bench

install: proxy
	mkdir -p $(BIN) $(MAN)
	cp -f proxy $(BIN)/proxy
	chmod 755 $(BIN)/proxy
	cp -f proxy.1 $(MAN)/proxy.1
	chmod 644 $(MAN)/proxy.1

uninstall:
	rm -f $(BIN)/proxy $(MAN)/proxy.1

clean:
	rm -f proxy

.PHONY: all run run-cache test bench install uninstall clean
