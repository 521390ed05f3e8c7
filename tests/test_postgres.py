"""PostgreSQL's protocol: its pure functions by tables, hostile servers over loopback, and what only a real server shows."""
import asyncio
import base64
import contextlib
import gc
import hashlib
import hmac
import itertools
import os
import pathlib
import random
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import warnings

import pomex
import pytest
from conftest import need_postgres
from ledgers import change, key_made, read, started, until

HERE = "postgresql://u:secret-word@127.0.0.1:%d/db"

# --- the address ----------------------------------------------------------------------------------

ADDRESSES = {  # URL -> hosts, user, password, database, sslmode
    "postgresql://u@h/n": ((("h", 5432),), "u", "", "n", "verify-full"),
    "postgres://u@h:6432/n": ((("h", 6432),), "u", "", "n", "verify-full"),
    "postgresql://u:p%40%2F%3A%25@h": ((("h", 5432),), "u", "p@/:%", "u", "verify-full"),
    "postgresql://u:a@b@h/n": ((("h", 5432),), "u", "a@b", "n", "verify-full"),
    "postgresql://u@a,b:2,[::1]:3/n?target_session_attrs=read-write": (
        (("a", 5432), ("b", 2), ("::1", 3)), "u", "", "n", "verify-full"),
    "postgresql://u@127.0.0.1/n": ((("127.0.0.1", 5432),), "u", "", "n", "disable"),
    "postgresql://u@localhost/n?sslmode=require": ((("localhost", 5432),), "u", "", "n", "require"),
    "postgresql:///n?host=/run/postgresql&user=u&password=x": ((("/run/postgresql", 5432),), "u", "x", "n", "disable"),
    "postgresql://u@/n?host=%2Frun%2Fpg&port=7": ((("/run/pg", 7),), "u", "", "n", "disable"),
    "postgresql://u:p%25x@my_db-1.example./n?sslmode=verify-ca": ((("my_db-1.example.", 5432),), "u", "p%x", "n", "verify-ca"),
    "postgresql://u@localhost,h/n": ((("localhost", 5432), ("h", 5432)), "u", "", "n", "verify-full"),
    "postgresql://u@db.localhost,127.9.0.1/n": ((("db.localhost", 5432), ("127.9.0.1", 5432)), "u", "", "n", "disable"),
    "postgresql://u@h,[fe80::1%25eth0]/n?port=7": ((("h", 7), ("fe80::1%eth0", 7)), "u", "", "n", "verify-full"),
    "postgresql://%C3%BC%40x@h/%2Fn?sslmode=disable": ((("h", 5432),), "ü@x", "", "/n", "disable"),
    "postgresql://u@h/n?password=a@b&user=w": ((("h", 5432),), "u", "a@b", "n", "verify-full"),
    "postgresql://u@h/?dbname=other&connect_timeout=3&application_name=x": ((("h", 5432),), "u", "", "other", "verify-full"),
}


@pytest.mark.parametrize("url", ADDRESSES)
def test_an_address_is_read_as_libpq_reads_it(url):
    address = pomex.read_postgres_url(url)
    assert (address.hosts, address.user, address.password, address.database, address.sslmode) == ADDRESSES[url]
    assert not address.password or address.password not in address.name


WRONG_ADDRESSES = {
    "postgresql://h/n": "it names no user",
    "postgresql://u@/n": "it names no host",
    "postgresql://u@h:0/n": "a port that is none",
    "postgresql://u@h:99999/n": "a port that is none",
    "postgresql://u@h/n?port=x": "a port that is none",
    "postgresql://u:pa/ss@h/n": "in a password @ : / ? # % are",
    "postgresql://u:pa?ss@h/n": "the parameter (hidden) is not known here",
    "postgresql://u:123?ss&tt@h/n": "the parameter (hidden) is not known here",
    "postgresql://u:pa?sslmode=ss@h/n": "a port that is none",
    "postgresql://:pa@h/n": "it names no user",
    "postgresql://u@a,,b/n": "it names no host",
    "postgresql://u@a..b/n": "it names no host",
    "postgresql://u@.localhost/n": "it names no host",
    "postgresql://u@a%00b/n": "it names no host",
    "postgresql://u@/n?host=/run%00": "it names no host",
    f"postgresql://u@{64 * 'a'}/n": "it names no host",
    "postgresql://u@[::1/n": "it names no host",
    "postgresql://u@h/n?sslmode=": "sslmode must be verify-full",
    "postgresql:u@h": "must be like",
    "mysql://u@h/n": "must be like",
    "postgresql://u@h/n?sslmode=prefer": "sslmode must be verify-full",
    "postgresql://u@h/n?sslmode=allow": "sslmode must be verify-full",
    "postgresql://u@h/n?options=-c%20x": "the parameter options is not known here",
    "postgresql://u@h/n?ssl_mode=require": "Did you mean sslmode?",
    "postgresql://u@h/n?target_session_attrs=standby": "target_session_attrs must be read-write",
    "postgresql://u@h/n?connect_timeout=0": "connect_timeout is in seconds",
}


@pytest.mark.parametrize("url", WRONG_ADDRESSES)
def test_a_wrong_address_is_refused_with_its_reason_and_never_shown(url):
    with pytest.raises(pomex.ConfigError) as refused:
        pomex.load_config(f'[database]\nurl = "{url}"\n', "/x/pomex.toml", {})
    said = str(refused.value)
    assert WRONG_ADDRESSES[url] in said and url not in said and 'url = (hidden)' in said and "ss@" not in said and "tt@" not in said


def test_the_url_and_its_password_may_stand_elsewhere():
    def place(text, **environ):
        files = {"/x/db": " postgresql://u:p1@h/n\n", "/x/short": "sqlite:other.db"}
        return pomex.load_config(f"[database]\n{text}\n", "/x/pomex.toml", environ, files.__getitem__).database.place
    assert place('url = "env:DB"', DB="postgresql://u@h/n") == "postgresql://u@h/n"
    assert place('url = "file:db"') == "postgresql://u:p1@h/n" and place('url = "file:short"') == "/x/other.db"
    for url in ("postgresql://u@h/n", "postgresql://u@h/n?sslmode=require"):
        assert pomex.read_postgres_url(place(f'url = "{url}"', PGPASSWORD="a&b c")).password == "a&b c"
    assert pomex.read_postgres_url(place('url = "postgresql://u:mine@h/n"', PGPASSWORD="other")).password == "mine"
    config = pomex.load_config("", "", {"POMEX_DATABASE_URL": "postgresql://u:mine@h/n", "HOME": "/h"})
    assert config.database.postgres.name == "postgresql://u@h:5432/n" and "mine" not in repr(config)
    with pytest.raises(pomex.ConfigError, match="that variable is not set"):
        place('url = "env:NOWHERE"')


# --- messages -------------------------------------------------------------------------------------

def message(kind, body=b""):
    return kind + struct.pack("!i", len(body) + 4) + body


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_messages_are_taken_whole_however_they_arrive(step):
    stream = message(b"Z", b"I") + message(b"C", b"SELECT 1\0") + message(b"1") + message(b"D", bytes(300))
    data, taken = bytearray(), []
    for at in range(0, len(stream), step):
        data += stream[at:at + step]
        while found := pomex.take_message(data):
            taken.append(found)
    assert taken == [(b"Z", b"I"), (b"C", b"SELECT 1\0"), (b"1", b""), (b"D", bytes(300))] and not data


@pytest.mark.parametrize("size", [-1, 0, 3, pomex.MAX_MESSAGE_BYTES + 1, 2**31 - 1])
def test_a_message_of_an_impossible_length_is_refused_at_once(size):
    with pytest.raises(pomex.PostgresError, match=f"a message of {size} bytes"):
        pomex.take_message(bytearray(b"D" + struct.pack("!i", size)))


def test_a_statement_numbers_its_values_and_leaves_texts_alone():
    sent = pomex.parse_message("SELECT '?', a FROM b WHERE c = ? AND d LIKE 'x''?' AND e IN (?, ?)")
    assert sent == message(b"P", b"\0SELECT '?', a FROM b WHERE c = $1 AND d LIKE 'x''?' AND e IN ($2, $3)\0\0\0")


VALUES = {"none": (None, b"\xff\xff\xff\xff"), "true": (True, b"\0\0\0\x011"), "number": (-12, b"\0\0\0\x03-12"),
          "text": ("ü?", b"\0\0\0\x03\xc3\xbc?"), "NUL": ("a\0b", b"\0\0\0\x03a?b"), "no": (False, b"\0\0\0\x010"),
          "empty": ("", b"\0\0\0\0")}


@pytest.mark.parametrize("value, sent", VALUES.values(), ids=VALUES)
def test_a_value_is_sent_in_text_form_behind_its_length(value, sent):
    assert pomex.encode_value(value) == sent
    assert pomex.bind_message([value]) == message(b"B", b"\0\0\0\0\0\x01" + sent + b"\0\0")


def test_what_cannot_be_sent_is_an_error_of_the_value_and_leaves_nothing_half_said():
    connection = object.__new__(pomex.PostgresConnection)
    connection.asked, connection.statements = bytearray(), []
    for values, wrong in ((["\udc80"], UnicodeEncodeError), ([1] * 40_000, struct.error)):
        with pytest.raises(wrong):
            connection.execute("SELECT ?", values)
        assert connection.asked == b"" and connection.statements == []


def columns(*types):
    described = b"".join(b"name\0" + struct.pack("!ihihih", 0, 0, oid, -1, -1, 0) for oid in types)
    return struct.pack("!h", len(types)) + described


def data_row(*cells):
    return struct.pack("!h", len(cells)) + b"".join(
        struct.pack("!i", -1) if cell is None else struct.pack("!i", len(cell)) + cell for cell in cells)


def test_each_type_of_a_row_is_read_as_sqlite_would_give_it():
    readers = pomex.read_columns(columns(16, 20, 23, 25, 1043, 701, 1700, 1700, 25))
    row = pomex.read_row(data_row(b"t", b"9007199254740993", b"-5", "ü".encode(), b"", b"1.5", b"12", b"1.25", None), readers)
    assert row == (1, 9007199254740993, -5, "ü", "", 1.5, 12, 1.25, None)
    assert [type(cell) for cell in row[:3]] == [int] * 3 and type(row[6]) is int


WRONG_ROWS = {"longer": data_row(b"1", b"2") + b"x", "more": data_row(b"1", b"2", b"3"), "shorter": data_row(b"1", b"2")[:-1],
              "fewer": data_row(b"1"), "no number": data_row(b"one", b"2"), "beyond its end": struct.pack("!hi", 1, 99) + b"1",
              "no sum": data_row(b"1", b"NaN"), "an endless sum": data_row(b"1", b"Infinity"), "empty": data_row(b"", b"2"),
              "a sum of a billion digits": data_row(b"1", b"1e999999999"), "too many digits": data_row(b"1", b"9" * 10_000)}


@pytest.mark.parametrize("body", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_a_row_that_does_not_fit_is_an_error(body):
    with pytest.raises((pomex.PostgresError, ValueError, struct.error)):
        pomex.read_row(body, pomex.read_columns(columns(20, 1700)))


@pytest.mark.parametrize("body", [b"", b"\0", columns(20)[:-9], b"\0\x01name", b"\0\x02" + columns(20)[2:]])
def test_columns_that_are_half_described_are_an_error(body):
    with pytest.raises((ValueError, struct.error)):
        pomex.read_columns(body)


def test_an_error_says_its_state_and_its_sentence_without_control_characters():
    error = pomex.read_error(b"SERROR\0C40001\0Mcould not\nserialize\0Dvalue of somebody\0\0")
    assert (error.sqlstate, str(error)) == ("40001", "could not?serialize")
    assert pomex.read_error(b"").sqlstate == "XX000" and "\ufffd" in str(pomex.read_error(b"M\xff\0"))
    assert str(pomex.read_error(b"C42501\0")) == "it does not say why" and len(str(pomex.read_error(b"M" + b"x" * 10**6))) == 200
    for state in (b"", b"40001\n", b"\x1b[2J", b"4" * 10**6, b"4000", "４０００１".encode()):
        assert pomex.read_error(b"C" + state + b"\0Mx\0").sqlstate == "XX000"


# --- SCRAM ----------------------------------------------------------------------------------------

FIRST = b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
LAST = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="


def test_scram_follows_the_vectors_of_rfc_7677():
    talk = pomex.scram_sha_256("pencil", "rOprNGfwEbeRWgbNEkqO")
    assert next(talk) == b"n,,n=,r=rOprNGfwEbeRWgbNEkqO"          # PostgreSQL takes the user from the start-up message
    sent = talk.send(FIRST)
    assert sent.startswith(b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=")


def exchange(password, first=None, last=None):
    """With a server that knows "pencil"."""
    talk = pomex.scram_sha_256(password, "mine")
    bare = next(talk)[3:]
    first = first if first is not None else b"r=minetheirs,s=" + base64.b64encode(b"salt") + b",i=4096"
    final = talk.send(first)
    without, _, proof = final.rpartition(b",p=")
    salted = hashlib.pbkdf2_hmac("sha256", b"pencil", b"salt", 4096)
    messages = b",".join((bare, first, without))
    key = hmac.digest(salted, b"Client Key", "sha256")
    signature = hmac.digest(hashlib.sha256(key).digest(), messages, "sha256")
    right = bytes(a ^ b for a, b in zip(key, signature)) == base64.b64decode(proof)
    signed = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), messages, "sha256")
    assert talk.send(last or b"v=" + base64.b64encode(signed)) == b""
    return right


def test_scram_proves_the_password_to_the_server_and_lets_it_prove_that_it_knows_it():
    assert exchange("pencil")
    with pytest.raises(pomex.PostgresError, match="it does not know the password itself"):
        exchange("other")


WRONG_SCRAM = {
    "another client's nonce": (b"r=yourstheirs,s=c2FsdA==,i=4096", None),
    "no nonce of its own": (b"r=mine,s=c2FsdA==,i=4096", None),
    "no rounds": (b"r=minetheirs,s=c2FsdA==,i=0", None),
    "rounds for hours": (b"r=minetheirs,s=c2FsdA==,i=2147483647", None),
    "rounds in words": (b"r=minetheirs,s=c2FsdA==,i=many", None),
    "a minute of rounds": (b"r=minetheirs,s=c2FsdA==,i=1000001", None),
    "rounds below nothing": (b"r=minetheirs,s=c2FsdA==,i=-4096", None),
    "no nonce": (b"s=c2FsdA==,i=4096", None),
    "no number of rounds": (b"r=minetheirs,s=c2FsdA==", None),
    "words without values": (b"r,s,i", None),
    "a proof that is no base64": (None, b"v=*"),
    "no proof": (None, b"x=y"),
    "no salt": (b"r=minetheirs,i=4096", None),
    "a salt that is no base64": (b"r=minetheirs,s=*,i=4096", None),
    "nothing": (b"", None),
    "not ASCII": (b"r=mine\xff,s=c2FsdA==,i=4096", None),
    "an error instead of a proof": (None, b"e=other-error"),
    "a proof of nothing": (None, b"v="),
    "a proof of another password": (None, LAST),
}


@pytest.mark.parametrize("first, last", WRONG_SCRAM.values(), ids=WRONG_SCRAM)
def test_a_server_that_does_scram_wrong_is_refused(first, last):
    begun = time.monotonic()
    with pytest.raises((pomex.PostgresError, ValueError, KeyError)):
        exchange("pencil", first, last)
    assert time.monotonic() - begun < 2


PASSWORDS = {  # RFC 4013 section 3, and what PostgreSQL does with a password that SASLprep forbids
    "I\u00adX": b"IX", "user": b"user", "USER": b"USER", "\u00aa": b"a", "\u2168": b"IX", "a\u00a0b": b"a b",
    "\u0007": b"\x07", "\u0627\u0031": "\u06271".encode(), "\u0627\u0031\u0628": "\u0627\u0031\u0628".encode(), "p\u0308": "p\u0308".encode(),
    "u\u0308": "ü".encode(), "\u00ad": "\u00ad".encode(), "\u0221": "\u0221".encode(),
    "\u200ba": b" a", "\uff1fx": b"?x", "a\ufe0fb": b"ab", "\ufb01": b"fi", "\u05d0a\u05d0": "\u05d0a\u05d0".encode(), "\ue000": "\ue000".encode(),
    # looked at before it is normalised: a symbol that becomes a letter of Hebrew, a mark that is forbidden and becomes another
    "a\u2135b": "a\u05d0b".encode(), "\u2135": "\u05d0".encode(), "\u05d0\u2135": "\u05d0\u2135".encode(), "a\u0340b": "a\u0340b".encode(),
}


@pytest.mark.parametrize("password", PASSWORDS, ids=ascii)
def test_a_password_is_prepared_as_the_server_prepared_it(password):
    assert pomex.prepare_password(password) == PASSWORDS[password]


# --- hostile servers ------------------------------------------------------------------------------

READY = message(b"R", struct.pack("!i", 0)) + message(b"K", struct.pack("!ii", 7, 8)) + message(b"Z", b"I")
CHECKED = (message(b"1") + message(b"2") + message(b"T", columns(25, 25)) + message(b"D", data_row(b"off", b"UTF8"))
           + message(b"C", b"SELECT 1\0") + message(b"Z", b"I"))
ASKED = {"md5": 5, "a password in the clear": 3, "GSS": 7}
AUTH = "it asks for another authentication than SCRAM-SHA-256, like md5 or a password in the clear (see password_encryption, " \
       "when the password was set, and pg_hba.conf) (SQLSTATE 28000)."
PROTOCOL = "cannot be used: it sent what is not PostgreSQL's protocol (SQLSTATE 08P01)."
LONGER = "cannot be used: it sent a row that is longer than its columns (SQLSTATE 08P01)."
CLOSED = "cannot be reached: it closed the connection."
SCRAM = message(b"R", struct.pack("!i", 10) + b"SCRAM-SHA-256\0\0")
PATIENCE = "cannot be reached: no answer in time."
STRANGER = "refuses this user or password: it does not know the password itself: is it the right server? (SQLSTATE 28P01)."
FULL = message(b"E", b"SFATAL\0C53300\0Msorry, too many clients already\0\0")


def asking(code, form):
    """An answer of SCRAM to what came, with the client's nonce for %s."""
    return lambda said: message(b"R", struct.pack("!i", code) + form.replace(b"%s", said.rpartition(b"r=")[2].partition(b",")[0]))


FIRST_OF_SCRAM = asking(11, b"r=%stheirs,s=c2FsdA==,i=1")


def proving(code):
    """As who knows the password, which is secret-word."""
    def answer(said):
        without = said[5:].rpartition(b",p=")[0]
        nonce = without.rpartition(b"r=")[2]
        messages = b",".join((b"n=,r=" + nonce.removesuffix(b"theirs"), b"r=" + nonce + b",s=c2FsdA==,i=1", without))
        key = hmac.digest(hashlib.pbkdf2_hmac("sha256", b"secret-word", b"salt", 1), b"Server Key", "sha256")
        return message(b"R", struct.pack("!i", code) + b"v=" + base64.b64encode(hmac.digest(key, messages, "sha256"))) + READY
    return answer


def checked(*rows):
    """The answer to what a new connection asks."""
    return (message(b"T", columns(*[25] * len(rows[0] if rows else ()))) + b"".join(message(b"D", data_row(*row)) for row in rows)
            + message(b"C", b"SELECT 1\0") + message(b"Z", b"I"))


HOSTILE = {  # what is sent for each thing that the client sends; None: the connection is closed, ...: silence -> the sentence
    "the right proof": ([SCRAM, FIRST_OF_SCRAM, proving(12), FULL + message(b"Z", b"I")],
                        "has no connection left: sorry, too many clients already (SQLSTATE 53300)."),
    "the right proof, as if it were a question": ([SCRAM, FIRST_OF_SCRAM, proving(11)], PROTOCOL),
    "a wrong proof": ([SCRAM, FIRST_OF_SCRAM, message(b"R", struct.pack("!i", 12) + LAST) + READY], STRANGER),
    "an error instead of the proof": ([SCRAM, FIRST_OF_SCRAM, message(b"R", struct.pack("!i", 12) + b"e=other-error") + READY], STRANGER),
    "no proof": ([SCRAM, FIRST_OF_SCRAM, READY], "refuses this user or password: " + AUTH),
    "no proof and no welcome": ([SCRAM, FIRST_OF_SCRAM, message(b"Z", b"I")], PROTOCOL),
    "ready in the middle of SCRAM": ([SCRAM, message(b"Z", b"I")], PROTOCOL),
    "a question as if it were the proof": ([SCRAM, lambda said: asking(12, b"r=%stheirs,s=c2FsdA==,i=1")(said) + READY], PROTOCOL),
    "a question before SCRAM": ([message(b"R", struct.pack("!i", 11) + b"r=x,s=c2FsdA==,i=1")], "refuses this user or password: " + AUTH),
    "authentication without a kind": ([message(b"R")], PROTOCOL),
    "notices without end": ([itertools.repeat(message(b"N") * 100)], PATIENCE),
    "another version of the protocol": ([message(b"v", bytes(8))], PROTOCOL),
    "ready without a result": ([READY, message(b"Z", b"I")], PROTOCOL),
    "a result without its row": ([READY, checked()], PROTOCOL),
    "a row too many": ([READY, checked((b"off", b"UTF8"), (b"off", b"UTF8"))], PROTOCOL),
    "a column too few": ([READY, checked((b"off",))], PROTOCOL),
    "a row that is not UTF-8": ([READY, checked((b"off", b"\xff"))], PROTOCOL),
    "an encoding that clears the screen": ([READY, checked((b"off", b"\x1b[2J\nUTF8" * 9_000))],
                                           "cannot be used: its encoding is " + ("?[2J?UTF8" * 12)[:100] + ", not UTF8 (SQLSTATE 22P05)."),
    "results without end": ([READY, itertools.repeat(message(b"1") * 100)], PATIENCE),
    "a giant row, a byte at a time": ([READY, itertools.chain([b"D\x03\xff\xff\xff"], itertools.repeat(b"x"))], PATIENCE),
    "results, then silence": ([READY, CHECKED[:-6], ...], PATIENCE),
    "an error that writes into the log": ([message(b"E", b"C\x1b[2J\n\0Msorry\n12:00 all is \x9bwell \xff" + b"!" * 10_000 + b"\0\0")],
                                          "cannot be used: sorry?12:00 all is \ufffdwell \ufffd" + "!" * 174 + " (SQLSTATE XX000)."),
    "nobody speaks": ([...], "cannot be reached: no answer in time."),
    "it closes": ([None], CLOSED),
    "half a message, then closed": ([b"R\0\0\0\x08\0", None], CLOSED),
    "half a message, then silence": ([b"R\0\0\0\x08\0", ...], "cannot be reached: no answer in time."),
    "a web server": ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "cannot be used: it sent a message of 1414811695 bytes (SQLSTATE 08P01)."),
    "garbage": ([b"\0\0\0\0\x08garbage!"], PROTOCOL),
    "a giant message": ([b"R\x7f\xff\xff\xff"], "cannot be used: it sent a message of 2147483647 bytes (SQLSTATE 08P01)."),
    **{what: ([message(b"R", struct.pack("!i", code) + b"salt")], "refuses this user or password: " + AUTH)
       for what, code in ASKED.items()},
    "an unknown mechanism": ([message(b"R", struct.pack("!i", 10) + b"SCRAM-SHA-1\0\0")], "refuses this user or password: " + AUTH),
    "welcome in the middle of SCRAM": ([SCRAM, READY], "refuses this user or password: " + AUTH),
    "a proof of nothing": ([SCRAM, message(b"R", struct.pack("!i", 11) + b"r=x,s=c2FsdA==,i=4096")],
                           "refuses this user or password: it asks for 4096 rounds of SCRAM, or for another client's nonce "
                           "(SQLSTATE 28P01)."),
    "SCRAM without words": ([SCRAM, message(b"R", struct.pack("!i", 11) + b"hello")], PROTOCOL),
    "a refusal": ([message(b"E", b"SFATAL\0C53300\0Msorry, too many clients already\0\0")],
                  "has no connection left: sorry, too many clients already (SQLSTATE 53300)."),
    "an error without fields": ([message(b"E", b"\0")], "cannot be used: it does not say why (SQLSTATE XX000)."),
    "no database of that name": ([message(b"E", b'C3D000\0Mdatabase "db" does not exist\0\0')],
                                 'is not there: database "db" does not exist (SQLSTATE 3D000).'),
    "a standby": ([READY, message(b"T", columns(25, 25)) + message(b"D", data_row(b"on", b"UTF8")) + message(b"C", b"SELECT 1\0")
                   + message(b"Z", b"I")], "is a standby, which cannot be written: it takes no writes (SQLSTATE 25006)."),
    "another encoding": ([READY, message(b"T", columns(25, 25)) + message(b"D", data_row(b"off", b"LATIN1"))
                          + message(b"C", b"SELECT 1\0") + message(b"Z", b"I")],
                         "cannot be used: its encoding is LATIN1, not UTF8 (SQLSTATE 22P05)."),
    "rows without their columns": ([READY, message(b"D", data_row(b"on")) + message(b"Z", b"I")], LONGER),
    "results of what nobody asked": ([READY, message(b"C", b"SELECT 0\0") * 5 + message(b"Z", b"I")], PROTOCOL),
    "a copy": ([READY, message(b"G", b"\0\0\0") + message(b"Z", b"I")], PROTOCOL),
    "rows without end": ([READY, message(b"T", columns(25)) + message(b"D", data_row(bytes(60_000))) * 100],
                         "cannot be used: it sent more than 1000000 bytes (SQLSTATE 08P01)."),
    "it closes before it is ready": ([READY, CHECKED[:-6], None], CLOSED),
    "an error, then it closes": ([READY, message(b"E", b"C57P01\0Mterminating connection\0\0"), None],
                                 "is stopping or starting: terminating connection (SQLSTATE 57P01)."),
}


@contextlib.contextmanager
def playing(script, context=None, greeting=None):
    """A server that answers each arrival with the next of the script: gives its port."""
    def serve():
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), client:
                client.settimeout(10)
                if greeting is not None:
                    client.recv(8)
                    client.sendall(greeting)
                if context is not None:
                    client = context.wrap_socket(client, server_side=True)
                for number, step in enumerate(script):
                    if number == 0 or step is not None:
                        said = client.recv(65536)
                    if step is None:
                        break
                    if step is ...:
                        ended.wait(10)
                        break
                    for piece in [step] if isinstance(step, bytes) else [step(said)] if callable(step) else step:
                        client.sendall(piece)
                else:
                    ended.wait(10)
                client.close()
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            ended.set()
            listening.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def refused_by(url):
    """The sentence; nothing is left open, and nothing secret is said."""
    gc.collect()            # what other tests left
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with contextlib.closing(pomex.open_database(url)) as db:
            with pytest.raises(pomex.LedgerError) as refused:
                db.commit(lambda tx: tx.read("SELECT 1"))
            db.stop()
        sentence = str(refused.value)
        del refused             # its traceback holds what was left open
        gc.collect()
    assert [each for each in said if issubclass(each.category, ResourceWarning)] == []
    assert "secret-word" not in sentence
    return sentence.removeprefix(f"The database {db.name} ")


@pytest.mark.parametrize("script, sentence", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_server_gets_a_sentence_and_no_patience(script, sentence, monkeypatch):
    monkeypatch.setattr(pomex, "ROUND_TRIP_S", 1.0)
    monkeypatch.setattr(pomex.PostgresConnection, "limit_s", 1.0)
    monkeypatch.setattr(pomex, "MAX_RESULT_BYTES", 1_000_000)
    begun = time.monotonic()
    with playing(script) as port:
        assert refused_by(HERE % port + "?connect_timeout=1") == sentence
    assert time.monotonic() - begun < 5


def test_a_server_that_trickles_does_not_hold_anybody(monkeypatch):
    monkeypatch.setattr(pomex, "ROUND_TRIP_S", 1.0)
    monkeypatch.setattr(pomex.PostgresConnection, "limit_s", 1.0)
    pieces = [bytes([byte]) for byte in READY]

    def serve():
        client, _ = listening.accept()
        with contextlib.suppress(OSError), client:
            client.recv(65536)
            for piece in pieces:
                client.sendall(piece)
                time.sleep(0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        begun = time.monotonic()
        assert refused_by(HERE % listening.getsockname()[1] + "?connect_timeout=1") == "cannot be reached: no answer in time."
        assert time.monotonic() - begun < 3
        thread.join(20)


DOUBT = ("was lost: the connection was lost while it committed, so that it is not known whether the change was made "
         "(SQLSTATE 08007).")
COMMITS = {"it closes": (None, DOUBT), "half an answer": (message(b"C", b"COMMIT\0")[:-1], DOUBT), "silence": (..., DOUBT),
           "garbage": (b"\0\0\0\0\x08garbage!", DOUBT), "no result": (message(b"Z", b"I"), DOUBT),
           "it is shut down": (message(b"E", b"C57P01\0Mterminating\0\0"), DOUBT),
           "it rolled back": (message(b"C", b"ROLLBACK\0") + message(b"Z", b"I"), "cannot be used: it rolled back (SQLSTATE 25P02)."),
           "a refusal": (message(b"E", b"C23505\0Mtwice\0\0") + message(b"Z", b"I"), "cannot be used: twice (SQLSTATE 23505).")}


@pytest.mark.parametrize("answer, sentence", COMMITS.values(), ids=COMMITS)
def test_a_lost_commit_is_said_to_be_in_doubt(answer, sentence, monkeypatch):
    monkeypatch.setattr(pomex, "ROUND_TRIP_S", 1.0)
    one = message(b"C", b"SELECT 1\0")
    script = [READY, CHECKED, message(b"C", b"BEGIN\0") + one * 2 + message(b"Z", b"T"), answer]
    with playing(script if answer is None or answer is ... else [*script, message(b"C", b"ROLLBACK\0") + message(b"Z", b"I")]) as port:
        assert refused_by(HERE % port + "?connect_timeout=1") == sentence


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """By name: (certificate, key) of one authority and of another."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments):
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, cwd=folder)
    for authority in ("ours", "other"):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={authority}", "-keyout", f"{authority}.key",
                "-out", f"{authority}.pem")
    shutil.copy(folder / "ours.pem", folder / "system-ours.pem")           # a word of its own in sslrootcert
    for name, authority, host, days in (("right", "ours", "127.0.0.1", 2), ("wrong-name", "ours", "127.0.0.2", 2),
                                        ("expired", "ours", "127.0.0.1", 0), ("foreign", "other", "127.0.0.1", 2)):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=db", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        (folder / "names").write_text(f"subjectAltName=IP:{host}\n")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial",
                "-days", days, "-extfile", "names", "-out", f"{name}.pem")
    return folder


TLS = {  # certificate, sslmode -> the sentence, "" where the connection is made
    ("right", "verify-full"): "", ("wrong-name", "verify-ca"): "", ("foreign", "require"): "certificate verify failed",
    ("wrong-name", "verify-full"): "IP address mismatch", ("foreign", "verify-full"): "unable to get local issuer certificate",
    ("expired", "verify-full"): "certificate has expired", ("foreign", "verify-ca"): "unable to get local issuer certificate",
}


@pytest.mark.parametrize("name, mode", TLS, ids="-".join)
def test_a_certificate_is_checked_as_far_as_sslmode_says(certificates, name, mode):
    if name == "expired":
        time.sleep(1.1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    with playing([message(b"E", b"C53300\0Mreached\0\0")], context, b"S") as port:
        sentence = refused_by(HERE % port + f"?sslmode={mode}&sslrootcert={certificates}/system-ours.pem&connect_timeout=2")
    if TLS[name, mode]:
        assert sentence.startswith("cannot be reached: ") and (TLS[name, mode] in sentence or mode == "require")
    else:
        assert sentence == "has no connection left: reached (SQLSTATE 53300)."


@pytest.mark.parametrize("greeting", [b"N", b"E", b"H"])
def test_without_tls_nothing_is_sent_where_sslmode_asks_for_it(greeting):
    with playing([...], None, greeting) as port:
        assert refused_by(HERE % port + "?sslmode=require") == (
            "cannot be used: it offers no TLS, and sslmode is require (SQLSTATE 08P01).")


TLS_TALK = {  # what follows the S -> the sentence's beginning
    "garbage": (b"S", [b"garbage " * 99], "cannot be reached: [SSL"), "silence": (b"S", [...], PATIENCE),
    "it closes": (b"S", [None], "cannot be reached: "), "a welcome without TLS": (b"S" + READY, [READY], "cannot be reached: [SSL"),
    "nothing": (b"", [...], PATIENCE),
}


@pytest.mark.parametrize("greeting, script, sentence", TLS_TALK.values(), ids=TLS_TALK)
def test_a_handshake_that_fails_is_over_in_time(greeting, script, sentence):
    begun = time.monotonic()
    with playing(script, None, greeting) as port:
        assert refused_by(HERE % port + "?sslmode=require&connect_timeout=1").startswith(sentence)
    assert time.monotonic() - begun < 4


def test_a_socket_that_is_not_there_is_said():
    assert refused_by("postgresql://u:secret-word@/n?host=/nowhere") == "cannot be reached: No such file or directory."


def test_a_root_certificate_that_is_not_there_is_said():
    with playing([...], None, b"S") as port:
        assert refused_by(HERE % port + "?sslmode=verify-full&sslrootcert=/nowhere.pem") == (
            "cannot be used: sslrootcert or sslcert: No such file or directory (SQLSTATE 08001).")


# --- a real server --------------------------------------------------------------------------------

@pytest.fixture
def url(cluster, template):
    return cluster.create(template)


@pytest.fixture
def db(url):
    with contextlib.closing(pomex.open_database(url)) as opened:
        yield opened
        opened.stop()


def test_a_lost_connection_is_made_again_and_nothing_is_lost(cluster, db):
    count = itertools.count()

    def run(tx):
        tx.insert("settings", {"name": f"n{next(count)}"})
        if next(count) == 1:            # between its statements, the first time
            cluster.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'pomex'")
        return tx.read("SELECT count(*) FROM settings WHERE name LIKE 'n%'")
    db.commit(lambda tx: None)
    assert db.commit(run) == [(1,)]
    cluster.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'pomex'")
    assert db.fetch("SELECT 1", ()) == [(1,)]
    cluster.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'pomex'")
    assert db.fetch("SELECT 2", ()) == [(2,)] and db.commit(lambda tx: tx.read("SELECT 3")) == [(3,)]


def test_what_takes_too_long_is_cancelled_on_the_server_and_the_next_works(cluster, db, monkeypatch):
    monkeypatch.setattr(pomex, "READ_S", 0.5)
    begun = time.monotonic()
    with pytest.raises(pomex.LedgerError, match=r"cannot be reached: no answer in time\."), db.errors():
        db.fetch("SELECT pg_sleep(30)", ())
    assert time.monotonic() - begun < 3
    for _ in range(40):
        running = cluster.psql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(30)%' AND state = 'active' "
                               "AND pid <> pg_backend_pid()")
        if running == "0":
            break
        time.sleep(0.05)
    assert running == "0" and db.fetch("SELECT 1", ()) == [(1,)]


def test_a_transaction_that_loses_against_another_runs_again(url, db):
    """Both change two rows in opposite order: one is told of a deadlock, and both changes are made."""
    db.commit(lambda tx: tx.execute_many("INSERT INTO counters VALUES (?, 0)", [("a",), ("b",)]))
    meet = threading.Barrier(2)

    def both(first, second, other):
        seen = []

        def run(tx):
            tx.execute("UPDATE counters SET value = value + 1 WHERE name = ?", (first,))
            if not seen:
                meet.wait(10)
            seen.append(first)
            tx.execute("UPDATE counters SET value = value + 1 WHERE name = ?", (second,))
        other.commit(run)
        return len(seen)
    with contextlib.closing(pomex.open_database(url)) as other:
        ran = []
        thread = threading.Thread(target=lambda: ran.append(both("b", "a", other)))
        thread.start()
        ran.append(both("a", "b", db))
        thread.join(20)
        other.stop()
    assert sorted(ran) == [1, 2] and db.fetch("SELECT value FROM counters ORDER BY name", ()) == [(2,), (2,)]


def fail_with(tx, sqlstate):
    tx.read(f"DO 'BEGIN RAISE ''lost'' USING ERRCODE = ''{sqlstate}''; END'")


@pytest.mark.parametrize("sqlstate, runs", [("40001", 6), ("40P01", 6), ("55P03", 1), ("57014", 1), ("23505", 1), ("XX000", 1)])
def test_what_loses_against_another_runs_again_and_what_fails_does_not(db, sqlstate, runs):
    ran = []

    def run(tx, losses):
        ran.append(tx.execute("INSERT INTO settings VALUES (?, '')", (f"n{len(ran)}",)))
        if len(ran) <= losses:
            fail_with(tx, sqlstate)
    with pytest.raises(pomex.LedgerError, match=rf"lost \(SQLSTATE {sqlstate}\)\."):
        db.commit(lambda tx: run(tx, 99))
    assert len(ran) == runs and db.fetch("SELECT name FROM settings WHERE name LIKE 'n%'", ()) == []
    if runs > 1:
        ran.clear()
        db.commit(lambda tx: run(tx, 2))
        assert db.fetch("SELECT name FROM settings WHERE name LIKE 'n%'", ()) == [("n2",)]


def test_a_commit_that_is_lost_is_not_run_again(cluster, db):
    cluster.psql("CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); "
                 "RETURN NULL; END'; CREATE CONSTRAINT TRIGGER die AFTER INSERT ON counters DEFERRABLE INITIALLY DEFERRED "
                 "FOR EACH ROW EXECUTE FUNCTION die(); ALTER FUNCTION die() SECURITY DEFINER", db.address.database)
    ran = []
    for _ in range(2):                  # on a new connection, and on a kept one
        ran.clear()
        with pytest.raises(pomex.LedgerError) as lost:
            db.commit(lambda tx: ran.append(tx.execute("INSERT INTO counters VALUES ('a', 1)")))
        assert ran == [1] and str(lost.value) == f"The database {db.name} {DOUBT}"
        db.commit(lambda tx: tx.read("SELECT 1"))
    assert db.fetch("SELECT * FROM counters", ()) == []


def test_a_member_that_fails_is_undone_alone_with_what_it_had_not_sent(db):
    insert = "INSERT INTO settings VALUES (?, '')"

    def fails_at_once(tx):
        tx.execute_many(insert, [("never",)])
        raise ValueError("no")

    def fails_by_its_values(tx):
        tx.execute_many(insert, [("never",), ("a",), ("never too",)])           # noticed by its end

    def fails_twice(tx):
        tx.execute_many(insert, [("a",)])               # not noticed before
        raise ValueError("no")

    def fails_in_the_middle(tx):
        tx.read("SELECT 1 / (count(*) - count(*)) FROM settings")

    def fails_within(tx):
        tx.execute_many(insert, [("outer",)])
        assert isinstance(tx.attempt(fails_by_its_values)[1], pomex.PostgresError)
        assert tx.attempt(lambda tx: tx.execute(insert, ("inner",))) == (1, None)

    def cannot_be_sent(tx):
        tx.execute(insert, ("never",))
        tx.execute(insert, ("\udc80",))
    members = [lambda tx: tx.execute(insert, ("a",)), fails_at_once, lambda tx: tx.execute_many(insert, [("b",)]), fails_by_its_values,
               fails_twice, lambda tx: tx.execute(insert, ("c",)), fails_in_the_middle, fails_within, cannot_be_sent,
               lambda tx: tx.read("SELECT 7")]
    attempted = db.commit(lambda tx: [tx.attempt(member) for member in members])
    assert [type(error) for _, error in attempted] == [
        type(None), ValueError, type(None), pomex.PostgresError, ValueError, type(None), pomex.PostgresError, type(None),
        UnicodeEncodeError, type(None)]
    assert [attempted[3][1].sqlstate, attempted[6][1].sqlstate, attempted[9][0]] == ["23505", "22012", [(7,)]]
    assert db.fetch("SELECT name FROM settings WHERE name <> 'secret' ORDER BY name", ()) == [("a",), ("b",), ("c",), ("inner",), ("outer",)]


def test_a_request_that_cannot_be_written_does_not_keep_others_from_it(url):
    async def check():
        async with started(url) as (ledger,):
            row = pomex.UsageRow("r", "q", 1, 1, "responses", "demo/echo", price="1 1 - - - -", input=5, cost_nanos=5000)
            good = [[row._replace(response_id=f"r{number}")] for number in range(4)]
            twice = [row._replace(response_id="twice", final=0), row._replace(response_id="twice")]        # of one attempt
            await asyncio.gather(*map(ledger.settle, [*good[:2], twice, *good[2:]]))
            assert read(ledger, "SELECT response_id FROM usage ORDER BY response_id") == [("r0",), ("r1",), ("r2",), ("r3",)]
            assert read(ledger, "SELECT sum(requests), sum(cost_nanos) FROM usage_rollups") == [(4, 20_000)]
            assert await pomex.verify(ledger.db) == (4, []) and ledger.available()
    asyncio.run(check())


def test_two_gateways_settle_the_same_keys_in_opposite_order_without_a_deadlock(cluster, url):
    keys = range(1, 9)

    async def settle_all(ledger, name, order):
        for number in range(15):
            await asyncio.gather(*(ledger.settle([pomex.UsageRow(
                f"{name}{number}-{key}", "q", 1, key, "responses", f"demo/m{key % 3}", account_id=key % 3, price="1 1 - - - -", input=5,
                cost_nanos=5000)]) for key in order))

    async def check():
        async with started(url, 2) as ledgers:
            await asyncio.gather(settle_all(ledgers[0], "a", keys), settle_all(ledgers[1], "b", keys[::-1]))
            assert await pomex.verify(ledgers[0].db) == (240, [])
    asyncio.run(check())
    assert cluster.psql(f"SELECT deadlocks FROM pg_stat_database WHERE datname = '{pomex.read_postgres_url(url).database}'") == "0"


def test_a_batch_of_ten_thousand_keys_finds_room_for_its_locks(db):
    locks = {pomex.lock_of(owner, number) for owner in ("key", "account") for number in range(20_000)}
    assert pomex.CHANGES not in locks and pomex.MIGRATION not in locks and len(locks) < 2_000
    assert db.commit(lambda tx: (tx.lock(locks), tx.read("SELECT 1"))[1]) == [(1,)]


def test_locks_of_two_gateways_are_taken_in_one_order(url, db):
    def both(database, names):
        for _ in range(40):
            database.commit(lambda tx: (tx.lock(names), tx.execute("UPDATE settings SET value = value WHERE name = 'secret'")))
    begun = time.monotonic()
    with contextlib.closing(pomex.open_database(url)) as other:
        thread = threading.Thread(target=both, args=(other, [1, 2, 3]))
        thread.start()
        both(db, [3, 2, 1])
        thread.join(20)
        other.stop()
    assert time.monotonic() - begun < 10           # a deadlock would be noticed after a second, each


def test_five_processes_open_a_new_database_at_once(cluster):
    url = cluster.create()
    ledgers = []

    def open_it():
        ledgers.append(pomex.Ledger.open(url))
    threads = [threading.Thread(target=open_it) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len({ledger.secret for ledger in ledgers}) == 1 and len(ledgers) == 5
    assert read(ledgers[0], "SELECT name FROM accounts") == [("default",)]
    for ledger in ledgers:
        ledger.close()


def test_five_programs_make_the_tables_of_a_new_database_at_once(cluster):
    url = cluster.create()
    program = "import os, pomex; ledger = pomex.Ledger.open(os.environ['DB']); print(ledger.secret.hex()); ledger.close()"
    running = [subprocess.Popen([sys.executable, "-W", "error", "-c", program], env={**os.environ, "DB": url}, text=True,
                                cwd=pathlib.Path(pomex.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(5)]
    said = [each.communicate(timeout=60) for each in running]
    assert len({secret for secret, _ in said}) == 1 and [errors for _, errors in said] == [""] * 5 and len(said[0][0]) == 65


def test_tables_that_cannot_be_made_leave_nothing(cluster, monkeypatch):
    url = cluster.create()
    name = pomex.read_postgres_url(url).database
    with monkeypatch.context() as patch:
        patch.setattr(pomex, "SCHEMA", (*pomex.SCHEMA, "CREATE TABLE half ("))
        with pytest.raises(pomex.LedgerError, match=r"cannot be used: syntax error .*\(SQLSTATE 42601\)"):
            pomex.Ledger.open(url)
    assert cluster.psql("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace", name) == "0"
    pomex.Ledger.open(url).close()
    for _ in range(100):                # a process of the server ends a moment later
        left = cluster.psql(f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'")
        if left == "0":
            break
    assert left == "0"


def test_another_programs_tables_are_left_alone(cluster):
    url = cluster.create()
    name = pomex.read_postgres_url(url).database
    cluster.psql("CREATE TABLE keys (id int)", name)
    with pytest.raises(pomex.LedgerError, match="has tables of another program"):
        pomex.Ledger.open(url)
    assert cluster.psql("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", name) == "1"


def test_an_old_version_goes_on_beside_a_newer_one(cluster, url):
    name = pomex.read_postgres_url(url).database
    cluster.psql("ALTER TABLE usage ADD COLUMN later TEXT NOT NULL DEFAULT ''; ALTER TABLE settings ADD COLUMN later TEXT;"
                 "ALTER TABLE processes ADD COLUMN later TEXT; COMMENT ON TABLE settings IS 'Pomex schema 99'", name)

    async def check():
        async with started(url) as (ledger,):
            token = await ledger.create_key("k", 1)
            row = pomex.UsageRow("r", "q", 1, 1, "responses", "demo/echo", price="0 0 0 0 0")
            ledger.begin("r", lambda: row)
            await ledger.settle([row])
            await ledger.beat()
            assert (await ledger.authorise(f"Bearer {token}", 2)).name == "k" and (await pomex.verify(ledger.db))[0] == 1
    asyncio.run(check())


def test_the_clock_is_the_databases(url, monkeypatch):
    monkeypatch.setattr(pomex.time, "time", lambda real=time.time: real() - 3600)

    async def check():
        async with started(url) as (ledger,):
            assert abs(ledger.now_s() - pomex.time.time() - 3600) < 5
    asyncio.run(check())


def test_reports_that_take_long_hold_up_no_requests(url):
    async def check():
        async with started(url, 2) as (ledger, other):
            token = await other.create_key("k", 1)
            slow = [asyncio.ensure_future(ledger.db.read("SELECT pg_sleep(3)")) for _ in range(8)]
            await asyncio.sleep(0.1)
            begun = time.monotonic()
            key = await ledger.authorise(f"Bearer {token}", 2)
            await ledger.beat()
            await other.revoke_key("k", 3)
            await until(lambda: ledger.keys[key.id].revoked_s, 1.5)
            assert time.monotonic() - begun < 2.5 and not slow[0].done()
            await asyncio.sleep(2.0)
            assert ledger.available() and not slow[-1].done()
            for each in slow[2:]:
                each.cancel()
            await asyncio.wait(slow)
    asyncio.run(check())


def test_strangers_with_keys_of_the_right_form_hold_up_no_requests(url, monkeypatch):
    looks, fetch = [], pomex.PostgreSQL.fetch

    def far_away(db, sql, values):
        looks.append(sql)
        time.sleep(0.02)
        return fetch(db, sql, values)

    async def ask(ledger, token):
        with pytest.raises(pomex.GatewayError) as refused:
            await ledger.authorise(f"Bearer {token}", 2)
        return refused.value.status

    async def check():
        async with started(url, 2) as (ledger, other):
            monkeypatch.setattr(pomex.PostgreSQL, "fetch", far_away)
            strangers = [asyncio.ensure_future(ask(ledger, pomex.new_key())) for _ in range(500)]
            await asyncio.sleep(0.01)
            assert (await ledger.authorise(f"Bearer {await other.create_key('k', 1)}", 2)).name == "k"
            assert {await each for each in strangers} == {401} and ledger.available()
            assert len(looks) < 40
    asyncio.run(check())


def test_a_gateway_that_had_a_gap_itself_calls_nobody_dead(url, monkeypatch):
    monkeypatch.setattr(pomex, "DEAD_S", 0.3)
    monkeypatch.setattr(pomex, "BEAT_S", 0.1)

    async def check():
        async with started(url, 2) as (ledger, other):
            row = pomex.UsageRow("theirs", "q", 1, 1, "responses", "demo/echo", price="0 0 0 0 0")
            other.begin("theirs", lambda: row)
            await other.recorded("theirs")
            await ledger.beat()
            for _ in range(4):              # what it has seen is old whenever it wakes
                await asyncio.sleep(0.4)
                await ledger.beat()
            assert read(ledger, "SELECT error_code FROM usage") == []
            for _ in range(6):
                await asyncio.sleep(0.1)
                await ledger.beat()
            assert read(ledger, "SELECT error_code FROM usage") == [("interrupted",)]
            await other.settle([row])
            assert read(ledger, "SELECT error_code, result FROM usage") == [("", "")] and (await pomex.verify(ledger.db))[1] == []
    asyncio.run(check())


FILTERED = {"key": "ana", "account": "default", "model": "openai/m1", "provider": "ü", "session": "S-1", "client": "coDEX",
            "result": "failed", "min_cost": "100000", "from": "1762000000000", "to": "1763000001234", "text": "R2", "endpoint": "/v1/responses"}


async def all_that_is_shown(db):
    """By reports, statements, the dashboard and exports, at one time."""
    now_s, first_ms = 1_763_629_920, 1_763_000_000_000
    shown = {by: await pomex.usage_report(db, by, 0, 30_000) for by in pomex.REPORT_BY}
    for name, text in FILTERED.items():
        where, values, table = pomex.usage_where({name: text}, 0)
        rows = await pomex.usage_rows(db, where, values, 500)
        assert 0 < len(rows) <= 250, name
        shown[name, "rows"], shown[name, "sums"] = rows, await pomex.usage_sums(db, (), 0, 2**60, where, values, table)
    for key_id in (0, 2):
        shown["overview", key_id] = await pomex.overview(db, first_ms, 86_400_000, 9, now_s, key_id)
    return {**shown, "accounts": await pomex.list_accounts(db, now_s), "export": [row async for row in pomex.rows_in_pages(db)],
            "statement": await pomex.statement_rows(db, 1, *pomex.month_bounds("2025-11")), "audit": await pomex.audit_rows(db),
            "verify": await pomex.verify(db)}


def test_all_that_is_shown_is_the_same_of_both_engines(url, tmp_path):
    chosen, requests = random.Random(1), []
    for number in range(250):
        one = pomex.UsageRow(f"r{number}", f"q{number}", 1_763_629_920_000 - chosen.randrange(40 * 86_400_000), 1 + number % 2,
                             "/v1/responses", f"openai/m{number % 3}", attempt=number % 2, provider=chosen.choice(["openai", "Z", "ü"]),
                             session=chosen.choice(["S-1", "s-1", "%_"]), client=chosen.choice(["codex Ä", "Codex ÄÖ", "x"]), price="1 1 - - - -",
                             error_code=chosen.choice(["", "x"]), result=chosen.choice(["completed", "failed"]), input=7, output=number,
                             cost_nanos=1000 * (7 + number), first_ms=chosen.randrange(900), total_ms=chosen.randrange(9000))
        given_up = one._replace(attempt=0, final=0, status="lost", provider="azure", result="", output=1, cost_nanos=8000)
        requests.append([given_up, one] if number % 2 else [one])
    place, shown = str(tmp_path / "p.db"), []
    for each in (place, url):
        with contextlib.closing(pomex.Ledger.open(each)) as ledger:
            for name in ("ana", "Bo"):
                key_made(ledger, name, 1)
            ledger.db.commit(lambda tx: pomex.settle_requests(tx, requests))
            change(ledger, "UPDATE audit SET time_ms = 5")
            change(ledger, "UPDATE accounts SET created_s = 5")
            shown.append(asyncio.run(all_that_is_shown(ledger.db)))
    for name, theirs in shown[0].items():
        assert shown[1][name] == theirs, name
    assert shown[0]["verify"] == (375, [])


def test_a_slow_report_delays_neither_a_revocation_nor_a_beat(url, monkeypatch):
    monkeypatch.setattr(pomex, "BEAT_S", pomex.KEYS_POLL_S)

    async def check():
        async with started(url, 2) as (ledger, other):
            await other.create_key("k", 1)
            await until(lambda: ledger.keys)
            await until(lambda: read(ledger, "SELECT 1 FROM processes WHERE process = ?", ledger.process))
            report = asyncio.create_task(ledger.db.read("SELECT pg_sleep(4)"))
            await asyncio.sleep(0.1)
            before, = read(ledger, "SELECT beats FROM processes WHERE process = ?", ledger.process)
            await other.revoke_key("k", 2)
            await until(lambda: ledger.keys[1].revoked_s, 1.0)
            await until(lambda: read(ledger, "SELECT beats FROM processes WHERE process = ?", ledger.process) > [before], 2.0)
            assert not report.done()
            await report
    asyncio.run(check())


def test_connections_that_have_fallen_silent_are_given_up_and_nothing_is_lost_at_the_end(cluster, url, monkeypatch):
    """As after a failover that the old host could not tell anybody of, or a firewall that forgets."""
    monkeypatch.setattr(pomex, "ROUND_TRIP_S", 1.0)
    monkeypatch.setattr(pomex, "READ_S", 2.0)
    rows = [pomex.UsageRow(name, "q", 1, 1, "responses", "demo/echo", price="0 0 0 0 0") for name in "ab"]

    async def check():
        ledger = pomex.Ledger.open(url)
        ledger.start()
        await ledger.db.write(lambda tx: None)
        await ledger.refresh()
        name = pomex.read_postgres_url(url).database
        silent = [*map(int, cluster.psql(f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}'").split())]
        cluster.signal(silent, signal.SIGSTOP)
        try:
            for row in rows:
                await until(ledger.available, 10.0)
                ledger.begin(row.response_id, lambda row=row: row)
                await ledger.settle(rows[:1])
            await until(lambda: ledger.available() and not ledger.unsaved, 10.0)
            ledger.close()
            assert len(silent) >= 3
        finally:
            cluster.signal(silent, signal.SIGCONT)
    asyncio.run(check())
    with contextlib.closing(pomex.open_database(url)) as db:
        assert db.commit(lambda tx: tx.read("SELECT response_id, error_code FROM usage ORDER BY id")) == [("a", ""), ("b", "interrupted")]
        assert db.commit(lambda tx: tx.read("SELECT count(*) FROM processes")) == [(0,)]


def test_everything_is_copied_there_and_back(cluster, tmp_path):
    file, again, url = str(tmp_path / "a.db"), str(tmp_path / "b.db"), cluster.create()

    async def use(place, token=""):
        async with started(place) as (ledger,):
            token = token or await ledger.create_key("k", 1, budget_nanos=10**9)
            key = await ledger.authorise(f"Bearer {token}", 2)
            number = len(await ledger.db.read("SELECT 1 FROM usage"))
            row = pomex.UsageRow(f"r{number}", "q", 1, key.id, "responses", "ü/m", price="1 1 - - - -", input=5, cost_nanos=5000)
            ledger.begin(f"r{number}", lambda: row)
            await ledger.settle([row])
            await ledger.create_key(f"k{number}", 1)
            assert (await pomex.verify(ledger.db))[1] == []
            return token, ledger.secret
    token, secret = asyncio.run(use(file))
    for source, target in ((file, url), (url, again)):
        with contextlib.closing(pomex.open_database(source)) as old, contextlib.closing(pomex.open_database(target)) as new:
            new.migrate()
            counts = pomex.copy_database(old, new)
            assert counts["usage"] >= 1 <= counts["usage_rollups"] and counts["keys"] > 1 and counts["settings"] >= 1
            with pytest.raises(pomex.BadRequest, match="is not empty: nothing was copied"):
                pomex.copy_database(old, new)
            for each in (old, new):
                each.stop()
        assert asyncio.run(use(target, token)) == (token, secret)


def test_a_password_that_is_not_ascii_and_a_socket_work(cluster):
    url = cluster.create()
    address = pomex.read_postgres_url(url)
    assert not address.password.isascii()
    login = url[len("postgresql://"):].partition("@")[0]
    with contextlib.closing(pomex.open_database(f"postgresql://{login}@/{address.database}?host={cluster.folder}&port={cluster.port}")) as db:
        assert db.commit(lambda tx: tx.read("SELECT current_user")) == [("pomex",)]
    cluster.psql("CREATE ROLE odd LOGIN")
    for password in PASSWORDS:          # as this server prepares them
        cluster.psql(f"ALTER ROLE odd PASSWORD '{password}'")
        with contextlib.closing(pomex.open_database(url.replace(login, f"odd:{urllib.parse.quote(password)}"))) as db:
            assert db.commit(lambda tx: tx.read("SELECT current_user")) == [("odd",)], ascii(password)
    wrong = url.replace(login, "pomex:wrong")
    assert refused_by(wrong).startswith("refuses this user or password: password authentication failed")


def test_behind_pgbouncer_in_transaction_mode(cluster, template):
    need_postgres("pgbouncer")
    url = cluster.create(template)
    with cluster.pgbouncer() as port:
        async def check():
            async with started(url.replace(f":{cluster.port}/", f":{port}/"), 2) as ledgers:
                await ledgers[0].create_key("k", 1)
                rows = [pomex.UsageRow(f"r{n}", "q", 1, 1, "responses", "demo/echo", price="0 0 0 0 0") for n in range(100)]
                await asyncio.gather(*(ledgers[n % 2].settle([row]) for n, row in enumerate(rows)))
                await until(lambda: ledgers[1].list_keys() != [])
                assert await pomex.verify(ledgers[0].db) == (100, [])
        asyncio.run(check())


def test_the_commands_of_postgresql(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    url = cluster.create()
    (tmp_path / "pomex.toml").write_text('[database]\nurl = "env:DB"\n')
    monkeypatch.setenv("DB", url)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pomex.main(["keys", "create", "ana"]) == 0 and pomex.main(["ledger", "verify"]) == 0
    assert pomex.main(["backup", "x.db"]) == 1
    said = capsys.readouterr()
    assert "pg_dump --format=custom --file=x.db postgresql://pomex@localhost" in said.err
    assert pomex.main(["db", "copy", "env:DB", "sqlite:there.db"]) == 0 and pomex.main(["db", "copy", "sqlite:none.db", "env:DB"]) == 1
    assert pomex.main(["db", "copy", "sqlite:there.db", "env:DB"]) == 1
    said_too = capsys.readouterr()
    assert "compared row by row" in said_too.err and "is not empty" in said_too.err
    password = pomex.read_postgres_url(url).password
    assert all(password not in text and "%C3%BC" not in text for text in (*said, *said_too))
    assert not os.path.exists("none.db") and not os.path.exists("x.db")
