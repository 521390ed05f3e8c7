"""How pomex.py is built: standard library only, layers that hold, a pure half, and an import that does nothing."""
import ast
import asyncio
import collections
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import pomex
from conftest import REPOSITORY

FILE = pathlib.Path(pomex.__file__)
TEXT = FILE.read_text(encoding="utf-8")
TREE = ast.parse(TEXT)
BANNERS = re.findall(r"^# === (\d+)\. (.+?) =+$", TEXT, re.MULTILINE)
LAYER_STARTS = [(TEXT.count("\n", 0, match.start()) + 1, int(match[1]))
                for match in re.finditer(r"^# === (\d+)\. ", TEXT, re.MULTILINE)]
LAST_PURE_LAYER = 7
PYENV = pathlib.Path.home() / ".pyenv" / "versions"         # seen before a test moves the home directory
WORLD = {"asyncio", "socket", "ssl", "sqlite3", "time", "secrets", "threading", "queue", "signal", "logging", "log",
         "pathlib", "open", "print", "input", "argparse", "subprocess", "random"}
OF_THE_WORLD = {"environ", "getenv", "urandom", "stat", "listdir", "getcwd", "expanduser"}      # os.…


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def layer_of(line):
    """The number of the layer a line lies on; 0 above the first."""
    return max((number for start, number in LAYER_STARTS if start <= line), default=0)


def test_only_the_standard_library_is_imported_and_not_inside_of_functions():
    late = {"compression"}          # of Python 3.14, asked for by name where it is there
    assert set(imported(TREE)) - sys.stdlib_module_names - late == set()
    functions = [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert [function.name for function in functions if any(imported(function))] == []


def test_the_layers_stand_in_order_each_once():
    numbers = [int(number) for number, _ in BANNERS]
    assert numbers == sorted(set(numbers)) and {1, 2, 3, 4, 5, 6, 7, 13} <= set(numbers)


def test_the_table_of_contents_names_the_layers_that_are_there():
    contents = re.findall(r"^ +(\d+)  (\S.*?)  ", ast.get_docstring(TREE, clean=False), re.MULTILINE)
    assert [number for number, _ in contents] == [number for number, _ in BANNERS]
    assert [title.split()[0].lower() for _, title in contents] == [title.split()[0].lower() for _, title in BANNERS]


def test_no_name_is_defined_twice():
    names = collections.Counter(
        name for node in TREE.body
        for name in ([node.name] if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else
                     [target.id for target in getattr(node, "targets", [getattr(node, "target", None)])
                      if isinstance(target, ast.Name)]))
    assert [name for name, times in names.items() if times > 1] == []


# Of the file at ed367ec: what a redesign replaced does not come back, and nothing keeps both names.
GONE = """
    ALWAYS_COUNTED AS_ASKED Annotation Answer Assembler.HANDLERS Assembler._annotate Assembler._argue
    Assembler._argument Assembler._close Assembler._close_part Assembler._complete Assembler._explain
    Assembler._fail Assembler._finish_argument Assembler._finish_item Assembler._fragment Assembler._item
    Assembler._json Assembler._mint Assembler._open Assembler._open_part Assembler._say Assembler._show
    Assembler._show_halves Assembler._stop Assembler._text Assembler._usage Assembler._whole
    Assembler.settle_items Attempt.settle_items Attempt.silent Attempt.take BLOCK_TEXT BUDGET Block.begin
    Block.citations Block.signature Block.start Block.text Block.whole CHAT_FAULTS CLAUDES Call Channel
    ChatCall.end ChatCall.is_whole ChatCall.pieces ChatCall.slot ChatDecoder._close_all
    ChatDecoder._close_calls ChatDecoder._close_texts ChatDecoder._content ChatDecoder._delta
    ChatDecoder._finish_reason ChatDecoder._known ChatDecoder._leave_tags ChatDecoder._new_call
    ChatDecoder._open_call ChatDecoder._reason ChatDecoder._say ChatDecoder._think ChatFrame
    ChatMessages.HANDLERS ChatMessages._assistant ChatMessages._assistant_message ChatMessages._call
    ChatMessages._file ChatMessages._flush ChatMessages._id ChatMessages._message ChatMessages._output
    ChatMessages._part ChatMessages._reasoning ChatMessages._user ChatStep Claude Close ConfigText
    DATA_KEYWORDS DATA_URL DECOMPRESSORS Decompressor Delta DemoStep Dialect.mid_system Dialect.passed
    EFFORT_CHOICES EffortRule.model FAULTS FAULT_RULES FAULT_WORDS FOREIGN_FILE Fail Fault FaultKind
    Fragment FunctionCall GEMINIS GEMINI_FAULTS GEMINI_STOP Gemini GeminiContents.HANDLERS
    GeminiContents._add GeminiContents._call GeminiContents._message GeminiContents._output
    GeminiContents._reasoning GeminiDecoder._end_call GeminiDecoder._say GeminiDecoder._server_tool
    GeminiDecoder._think HEADER_NAME HEADER_VALUE HIGH_SURROGATE History.dropped INLINE_DATA_TOKENS
    ITEM_RULES Inflater Item.argument Item.blanks Item.closing Item.held Item.opened Item.part Item.place
    Item.scanned Item.sent Item.shown Item.state Item.unwrapper Job KeyRule Kind LIST MAX_METADATA
    MEDIA_BY_ENDING MUST_CALL Manners MessagesBook MessagesDecoder.HANDLERS MessagesDecoder._block_stop
    MessagesDecoder._close_all MessagesDecoder._close_empty_call MessagesDecoder._close_message
    MessagesDecoder._delta MessagesDecoder._end_call MessagesDecoder._error MessagesDecoder._message_delta
    MessagesDecoder._message_start MessagesDecoder._message_stop MessagesDecoder._search
    MessagesDecoder._start MessagesDecoder._thought MessagesDecoder._usage MessagesTurns._add
    MessagesTurns._block MessagesTurns._blocks MessagesTurns._call MessagesTurns._leave
    MessagesTurns._marked MessagesTurns._message MessagesTurns._output MessagesTurns._place_later
    MessagesTurns._reasoning MessagesTurns._system MessagesTurns.lost_thought NORMALISED_FIELDS
    NOT_HISTORY NOT_NORMALISED NO_FIELDS NO_MINIMAL OPENAI_EFFORTS OPENAI_FIELDS OPEN_MODELS
    OPEN_TEMPLATES Open PART_CHANNEL PATH_STEP PLAIN_CALLS PLAIN_OUTPUTS PLAIN_TEXTS PROXY Part
    PartShape.at READINGS REQUEST_RULES RESPONSES_DELTAS ROLES Reader._announce Reader._begin_body
    Reader._chunked Reader._counted Reader._finish Reader._odd_chunk Reader._open_chunk Reader._pause
    Reader._rest_of_chunk Reader._section Reader._starve Reader._trailers Reader._until_close
    Reader._whole_chunks Reading Relay RequestHead.chunked RequestHead.target RequestHead.version
    RequestReader._check_start RequestReader._head RequestReader.idle ResponseHead.chunked
    ResponseHead.reason ResponseHead.version ResponseReader._final ResponseReader._head
    ResponseReader.idle ResponseReader.next ResponsesDecoder.HANDLERS ResponsesDecoder._added
    ResponsesDecoder._annotation ResponsesDecoder._delta ResponsesDecoder._done ResponsesDecoder._error
    ResponsesDecoder._fill ResponsesDecoder._open ResponsesDecoder._rest ResponsesDecoder._slot
    ResponsesDecoder._terminal Rule SAYS_NOTHING SIMPLE_BLOCK SSEDecoder._blocks
    SSEDecoder._check_size SSEDecoder._with_lf SSEDecoder._without_mark STRICT_FORMATS STRING_PART SWITCH
    Stop.incomplete Stop.last Surroundings TEXT_FIELD TEXT_FILE THOUGHTS TOOL_RULES Thought ToolBook
    Translation UNKNOWN_NAME UP_TO_HIGH Unwrapper UpstreamError.code UpstreamError.type Usage.broken Whole
    WireApi.facts WireApi.key_header amount barred begins_new_call builtin call_texts calling_mode
    calls_of carried chat_call chat_failure chat_frame chat_settings chat_tool chat_tool_choice chat_usage
    check_base_url check_fields check_overrides check_request check_url check_value checked claude
    clean_schema cleartext_warnings compact content_length deflate_decompressor demo_call demo_chunk
    demo_steps detected dicts_in document_block drop_effort duration_s echo_tool effort_fields end_of
    error_codes error_data escaped_controls exactly explained fault_kind fault_of fault_words
    filter_explanation fits_any flat_name framing from_environment gemini_call gemini_function gemini_name
    gemini_part gemini_row gzip_decompressor half_call image_block input_estimate is_base64 is_torn
    is_whole json_dict limit_reset_s manners_of media_part mend message_text messages_call
    messages_exchange model_fields object_text opaque overridden pair_calls parse_block parse_target
    place_in plain_choice plain_history plain_input plain_item plain_number plain_part point_s
    put_argument quote read_admin_token read_database read_value reasoning_of relay_body repair_gemini
    repair_messages replayed responses_call resumed_body said_in sampling_of scan_json settings_of
    shell_action shown_only sign_step split_tag_start strings strip_fence table_of table_with
    thinking_config thinking_of token_limits toml_path trail unfit unique_calls untraced url_citation
    whole_characters with_headers with_host with_key zstd_decompressor zstd_module
    CHAT_ERRORS CHAT_STOP ChatDecoder._done ChatDecoder.add_all ChatDecoder.dialect ChatDecoder.feed
    Decoder.add_all EncodeContext.call_prefix GeminiDecoder.add_all GeminiDecoder.feed GeminiDecoder.whole
    ItemDecoder._fail MAX_CALL_ID MESSAGES_STOP MessagesDecoder.add_all MessagesDecoder.feed
    MessagesDecoder.resume ResponsesDecoder.feed ResponsesDecoder.read SEAL_REFUSED TextDelta.place
    WireApi.repair add_user_turn drop_field drop_search inband_error lower_limit repair_from repair_responses
    tool_use_id
""".split()

# Of the file at 523dd95: what the ledger before this one was made of.
GONE += """
    Assembler.reasoning EMPTY_FIELDS INPUT_START INPUT_TEXT Item.more Item.pending_input
    MAX_PENDING_INPUT Passthrough.OPENING_EVENT Passthrough.ignore
    ResponsesPassthrough.OPENING_EVENT ResponsesPassthrough.builder
    ResponsesPassthrough.rewrite_head Sink.reasoning TOKEN_BYTES VALUE_BYTES check_parts check_tools
    decode_input escape_controls is_complete_json state_folder strict_scan
""".split()
GONE += """
    ADD_TO_DAILY Bill Budgets DURATION_S ENTRY_VALUES Entry Exceeded FIRST_TOKEN_S Histogram Intent
    JOURNAL_BYTES Journal LEASE_EXACTLY LEASE_MORE LEASE_S LOOK_EVERY_S Ledger._ask
    Ledger._refresh_keys Ledger._renew_journal Ledger._save Ledger._save_soon Ledger._sicken
    Ledger._sync_all Ledger._unwell Ledger._write_down Ledger.execute Ledger.open_requests
    Ledger.read Ledger.reader Ledger.sound Ledger.used_nanos Ledger.write LedgerReader Limit.meter
    Limit.most Limit.room Limit.slot Limit.values Line MIGRATIONS Metrics._observe Metrics.labels
    News PART_SUMS PriceBook RATE_S RATE_SLOT_S ROLL_AT_ONCE ROLL_ROWS ROWS_A_STATEMENT
    RUNNING_SHOWN_S SAVE_AFTER_S SHARED_A_TICK TEND_S TRACES_KEPT Tariff Watch abandoned_journals
    apportion builtin_tariffs configured_tariff  discard_file encode_line export_rows
    fraction insert_entries journal_entries journal_line key_hint key_of_id last_row_id lock_file
    news_frame  quota_sentence rate_wait refusal renew_leases roll_up rolled_up
    rows_after select_rows send_away stored_setting sum_queries sum_rows usd
""".split()

# Of the file at e7c18fb: the command line before it had one table of operations with the admin API.
GONE += """
    ACCOUNT_FIELDS ADDRESSED Asking CODEX_WRITE COMMAND_GROUPS COMMAND_TO_TYPE CREDIT_FIELDS
    Config.flags Finding Finding.fix Finding.state Finding.text Finding.what INIT_TEXT KEY_FLAGS
    PROVIDER_CURES RATE_FIELDS SOCKET_UNIT TOML_PARTS add_account ask_http
    audit_reload closed_to_others codex_file codex_program codex_record dashboard_line demo_stream
    examine find_gateway judged key_finding key_words live_checks model_listed
    no_listening own_certificate painted probe_models readiness retyped
    run_accounts_create run_accounts_credit run_keys_create run_keys_edit run_keys_revoke
    run_statement run_version server_field show_difference surveyed table_findings usd_or
    with_values without_pomex
""".split()

# Of the file at e7c18fb: the dashboard's shared poll of the database, objects around a few functions, sums said twice.
GONE += """
    API_HEADERS Ask.filters Guard LEFT_OUT LiveEvent LiveFeed MODEL_ROUTE Metrics NUMERIC_FILTERS close_session find_session histogram_lines is_codex
    left_out live log_rows log_sums model_state percentiles play refused_requests time_series written_labels
""".split()
# Of the file at e7c18fb: the queue that a database had of its own, and what was said twice in the ledger.
GONE += """
    Ledger.unrecorded Ledger.waiting Ledger.ids Ledger.saving Ledger.write Needs OLD_SUMS
    Reservation._affordable_output_tokens SQLite._commit_waiting SQLite.answer SQLite.committing
    SQLite.run SQLite.waiting journal_requests nanos_since  quota_message
    take_over_old_days wake_waiters
""".split()
# Of the file at 875c70a: what the dashboard's API had twice, or for nobody.
GONE += """
    AdminRoute Ask EXPORTS SIGN_OF_LIFE_S event_frame open_count
""".split()
# Of the file at 875c70a: checks of OpenAI's own limits, and rules said twice.
GONE += """
    HEADER OWN_HEADERS SHELL_FIELDS TYPED check_metadata check_part check_tool with_digest
""".split()


# Of the file at b872025: the edge's second ways to do a thing, and words of its own.
GONE += """
    AccessLog Catalogue Client.begin Client.drain ClientProtocol Connection.handle Connection.take_body Connection.time_limit
    FIXED GatewayServer.adopt ModelCatalog.serves OUR_LIMITS PATIENCE_S Pump.check_deadline Pump.deadline Router.check_answer
    Server.give_up Server.who_asks UpstreamProtocol Worker.heard Worker.pipe Worker.ready Worker.streams
    Workers.install_signal_handlers Workers.receive bypasses_proxy connections_that_fit error_answer handed_sockets keyed
    listening_as printable printable_sentence printable_text proxy_address read_until refuse set_up_transport
""".split()
# Of the file at 875c70a: journals of v00083, refusals that were remembered, a second way to take a limit, an interface of one class.
GONE += """
    CHARGE FULL_NS GRANT Key.limited Ledger.apply_disabled Ledger.refused Ledger.write_beat LimitExceeded.until OLD_ENTRY OLD_INTENT OLD_LINE REFUSED_AT_MOST_S REFUSED_S SAME_TROUBLE
    IDS_AT_ONCE SELECT_OPEN SQLITE_WORDS  charge_rate day_words in_batches old_journals take_over_journal
""".split()
# Of the file at 875c70a: what the command line said twice, probes of doctor, rows that named a running gateway.
GONE += """
    CIRCUITS Doctor OneOf OneOf.fields OneOf.required Operation.body_fields PROVIDER_FIXES RELOAD_WAIT_S
    SERVICE_UNIT colored fetch gateway_status init_text list_balances local_models record_gateway
    recorded_gateways run_health run_unit show_balance version_at
""".split()
# Of the file at 253e22a: a second way to put settings into a file and take them out.
GONE += """
    BLOCK_BEGIN BLOCK_END CODEX_KEYS CODEX_TABLE_PATH REPLACED is_codex_key other_leaves subtable suggest toml_leaves with_block
    without_block
""".split()


def definitions(body, prefix=""):
    """Qualified names of the classes, functions, methods, fields and constants of a module or class."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from definitions(node.body, f"{prefix}{node.name}.")
        for target in getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else []):
            yield from (prefix + each.id for each in ast.walk(target) if isinstance(each, ast.Name))


def test_what_was_replaced_is_gone():
    known = set(definitions(TREE.body))
    assert {"Sink", "Sink.text", "Usage.input", "WIRES"} <= known
    assert known & set(GONE) == set()


def test_every_connection_is_asyncios_streams():
    """One small subclass of StreamReaderProtocol, and nothing else beneath the streams: DESIGN.md 1."""
    def below(kind):
        return {each for child in kind.__subclasses__() for each in (child, *below(child))}
    ours = {kind for kind in below(asyncio.BaseProtocol) if kind.__module__ == "pomex"}
    assert ours == {pomex.StreamProtocol}
    assert {base for kind in ours for base in kind.__bases__} == {asyncio.StreamReaderProtocol}
    used = {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    below_streams = {"sock_accept", "sock_recv", "sock_sendall", "sock_connect", "add_reader", "add_writer", "start_tls",
                     "create_server", "create_connection", "connect_accepted_socket", "open_connection", "start_server"}
    assert used & below_streams == {"create_server", "create_connection", "connect_accepted_socket", "start_tls"}
    factories = re.findall(r"(?:loop\.create_server|(?<!socket\.)create_connection|connect_accepted_socket)\(([^,]+),", TEXT)
    assert sorted(factories) == ["lambda: StreamProtocol(READ_BYTES // 2)", "self.new_protocol", "self.new_protocol"]
    assert len(re.findall(r"\bStreamProtocol\(", TEXT)) == 3         # its class, and a line each for providers and clients
    assert re.findall(r"(\S+)\.start_tls\(", TEXT) == ["connection.writer", "self.writer"]


def test_a_definition_names_only_things_of_its_own_layer_or_of_those_before_it():
    shape = REPOSITORY.parent / "shared" / "tools" / "shape.py"
    if not shape.is_file():
        pytest.skip("shape.py does not lie beside this repository")
    done = subprocess.run([sys.executable, shape, "--layers", FILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_layers_above_the_line_are_pure():
    found = []
    for node in ast.walk(TREE):
        line = getattr(node, "lineno", 0)
        if not 1 <= layer_of(line) <= LAST_PURE_LAYER:
            continue
        if isinstance(node, (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)):
            found.append((line, "async"))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in WORLD:
            found.append((line, node.id))
        elif isinstance(node, ast.Attribute) and node.attr in OF_THE_WORLD and ast.unparse(node.value) in ("os", "os.path"):
            found.append((line, ast.unparse(node)))
    assert found == []


WATCH = """
import sys
kept = set(sys.modules)
done = []
def watch(event, arguments):
    if event == "open" and (arguments[2] or 0) & 3 or event.startswith(("socket.", "sqlite3.", "subprocess.")) \\
            or event in ("_thread.start_new_thread", "os.mkdir", "os.putenv", "os.chmod", "os.remove", "signal.signal"):
        done.append((event, arguments))
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc", ".so", ".pem", ".cnf", ".zip")):
        done.append((event, arguments))
import argparse, asyncio, base64, binascii, codecs, collections.abc, concurrent.futures, contextlib, dataclasses
import difflib, email.utils, errno, functools, hashlib, hmac, http, ipaddress, itertools, json, logging, math, os
import pathlib, queue, re, secrets, signal, socket, sqlite3, ssl, threading, time, tomllib, typing, urllib.parse, zlib
sys.dont_write_bytecode = True
sys.addaudithook(watch)
import pomex
print(done, logging.root.handlers, pomex.log.handlers, pomex.log.level, threading.active_count())
"""


def test_no_line_of_the_core_is_longer_than_110():
    core = TEXT[:TEXT.index("\n# === 8. ")].split("\n")
    assert [number for number, line in enumerate(core, 1) if len(line) > 110] == []


def test_importing_does_nothing():
    environ = {**os.environ, "PYTHONPATH": str(FILE.parent)}
    done = subprocess.run([sys.executable, "-c", WATCH], capture_output=True, text=True, env=environ, cwd="/")
    assert (done.stdout.strip(), done.stderr) == ("[] [] [] 0 1", "")


def test_the_file_parses_with_the_grammar_of_python_3_8():
    # In a process of its own: what else happens in this one can make ast.parse fail with a SystemError (CPython gh-106905).
    parse = "import ast, pathlib, sys; ast.parse(pathlib.Path(sys.argv[1]).read_bytes(), feature_version=(3, 8))"
    done = subprocess.run([sys.executable, "-c", parse, FILE], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def python(version):
    """An interpreter of this version that starts, or None."""
    built = sorted(map(str, PYENV.glob(f"{version}.*/bin/python")))
    candidates = [*built[-1:], *filter(None, [shutil.which(f"python{version}")])]
    works = (path for path in candidates if not subprocess.run([path, "-c", ""], capture_output=True).returncode)
    return next(works, None)


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10"])
def test_an_old_python_is_told_which_one_is_needed(version):
    found = python(version)
    if not found:
        pytest.skip(f"there is no Python {version} here")
    done = subprocess.run([found, FILE, "serve"], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(rf"Pomex needs Python 3\.11 or newer; this is {re.escape(version)}\.\d+\S* at \S+\.\n", done.stderr)


def test_the_tests_own_starter_parses_on_python_3_6_too():
    ast.parse((REPOSITORY / "tests" / "__main__.py").read_text(encoding="utf-8"), feature_version=(3, 6))
