"""Layer 7: pomex.toml to frozen dataclasses, and what is said of a file that will not do."""
import re

import pytest

import pomex
from conftest import REPOSITORY

ENVIRON = {"HOME": "/home/me", "OPENAI_API_KEY": "sk-openai-0123456789", "AZURE_OPENAI_API_KEY": "azure-key"}
FILES = {"/run/secrets/elsewhere": "file-key\n", "conf/near": "near-key", "/home/me/key": "home-key", "/empty": "\n"}


def read_file(path):
    if path not in FILES:
        raise FileNotFoundError(2, "No such file or directory")
    return FILES[path]


def load(text, name="pomex.toml", environ=ENVIRON):
    return pomex.load_config(text, name, environ, read_file)


def provider(lines, name="x"):
    """A [providers.x] that is complete but for `lines`."""
    base = {"wire_api": 'wire_api = "chat"', "base_url": 'base_url = "https://llm.example.com/v1"'}
    given = [line for key, line in base.items() if not re.search(rf"^{key} =", lines, re.MULTILINE)]
    return "\n".join([f"[providers.{name}]", *given, lines, ""])


COMPLAINTS = {
    # of the file
    "a key of another spelling": (
        "[server]\n\n[providers.local]\nbase-url = 'http://10.0.0.7:8000/v1'\n",
        'pomex.toml: unknown key "base-url" in [providers.local]. Did you mean base_url?'),
    "an unknown key": (
        "[database]\nzzz = 1\n",
        'pomex.toml: unknown key "zzz" in [database]. Known keys: url, durability, max_unsaved.'),
    "an unknown section": ("\n[sever]\nport = 1\n",
                           "pomex.toml: unknown section [sever]. Did you mean server?"),
    "a key before the first section": (
        "# mine\nport = 80\n", 'pomex.toml: key "port" stands outside any section, like [server].'),
    "an unknown key before the first section": ("zzz = 80\n",
                                                'pomex.toml: key "zzz" stands outside any section, like [server].'),
    "broken TOML": ("[server]\nport 80\n",
                    "pomex.toml line 2: Expected '=' after a key in a key/value pair (column 6)"),
    "TOML that ends early": ('[server]\nhost = "', "pomex.toml: Unterminated string (at end of document)"),
    "a section that is a value": ("server = 5\n", "pomex.toml: server must be a table: [server]"),
    "a provider that is a value": ("[providers]\nx = 5\n",
                                   "pomex.toml: providers.x must be a table: [providers.x]"),
    # of one value
    "text for a number": ('[server]\nport = "80"\n',
                          'pomex.toml: [server] port = "80": must be an integer, not a string.'),
    "a port out of range": ("[server]\nport = 70000\n",
                            "pomex.toml: [server] port = 70000: its value must be between 0 and 65535."),
    "true for a number": ("[server]\nport = true\n",
                          "pomex.toml: [server] port = true: must be an integer, not true or false."),
    "a number that is none": ("[server]\nheartbeat_s = nan\n",
                              "pomex.toml: [server] heartbeat_s = NaN: its value must be between 0.1 and 3600."),
    "a number for text": ("[server]\nhost = 1\n", "pomex.toml: [server] host = 1: must be a string, not an integer."),
    "no host, which is every interface": ('[server]\nhost = ""\n',
                                          'pomex.toml: [server] host = "": its length must be at least 1.'),
    "brackets in brackets": ("[server]\nport = " + "[" * 5000, "pomex.toml: "),
    "a number of 5,000 digits": ("[server]\nport = " + "9" * 5000, "pomex.toml: Exceeds the limit"),
    "a number for a truth": ("[demo]\nenabled = 1\n",
                             "pomex.toml: [demo] enabled = 1: must be true or false, not an integer."),
    "an unknown choice": ('[server]\nlog_format = "xml"\n',
                          'pomex.toml: [server] log_format = "xml": must be one of plain, json.'),
    "text for a list": ('[server]\npublic_hosts = "a.example"\n',
                        'pomex.toml: [server] public_hosts = "a.example": must be a list of strings.'),
    "a certificate alone": ('[server]\ntls_cert = "a.pem"\n',
                            "pomex.toml: [server] tls_cert and tls_key need each other."),
    "a date": ("[server]\nport = 2026-01-31\n", 'pomex.toml: [server] port = "2026-01-31": must be an integer, not a date.'),
    "a number in a list": ('[server]\npublic_hosts = ["a", 5]\n', 'public_hosts = ["a", 5]: [1] must be a plain name'),
    "a number in a secret table": (provider('query_params = { "x" = 5 }'), "query_params = (hidden): ['x'] must be a string, not an integer."),
    "a price below nothing": ('[prices."a/b"]\ninput = -1\n', 'input = -1: its value must be between 0 and 100000.'),
    "a price too exact": ('[prices."a/b"]\ninput = 0.0000001\n', "input = 1e-07: must be an amount of dollars with at most six decimals."),
    "a price factor below nothing": ('[prices."a/b"]\ntiers = { flex = -1 }\n', "['flex']: its value must be between 0 and 999999999."),
    "a price factor too exact": ('[prices."a/b"]\ntiers = { flex = 0.1234567 }\n', "must be a table of numbers, like { priority = 2 }."),
    "another database": ('[database]\nurl = "mysql://me:secret@host/db"\n',
                         'pomex.toml: [database] url = (hidden): must be like "sqlite:pomex.db" or "postgresql://user@host/name".'),
    # of providers
    "a name in capitals": ("[providers.OpenAI]\n", 'pomex.toml: provider name "OpenAI": use small letters, '
                                                   'digits, "_", "." and "-".'),
    **{f"public host {name}": (f"[server]\npublic_hosts = ['a.example', '{name}']", "[1] must be a plain name, without scheme, port or wildcard.")
       for name in ("*", "https://a.example/", "a.example:8443", "*.a.example")},
    **{f"header {name}": (provider(f'http_headers = {{ "{name}" = "x" }}'), f"{name} = (hidden): is a header that Pomex sets itself.")
       for name in ("Host", "content-length", "Transfer-Encoding")},
    **{f"proxy {name}": (f"[server]\ntrusted_proxies = ['{name}']", '[0] must be an address or a network, like "10.0.0.7" or "10.0.0.0/8".')
       for name in ("proxy.example", "10.0.0.1/8", "*", "10.0.0.0/33")},
    "no wire": ("[providers.x]\nbase_url = 'https://a.example/v1'\n",
                "pomex.toml: [providers.x] lacks wire_api, one of responses, chat"),
    "no address": ("[providers.x]\nwire_api = 'chat'\n",
                   'pomex.toml: [providers.x] lacks base_url, like "https://api.example.com/v1".'),
    "an unknown wire": ("[providers.x]\nwire_api = 'soap'\n",
                        'pomex.toml: [providers.x] wire_api = "soap": must be one of responses, chat, '
                        'messages, gemini, demo.'),
    "an address without scheme": (provider('base_url = "llm.example.com/v1"'),
                                  'pomex.toml: [providers.x] base_url = "llm.example.com/v1": must be an '
                                  'address like "https://api.example.com/v1": no user, query or fragment (there are api_key and query_params), '
                                  'and no /chat/completions, /responses or /messages, which Pomex appends.'),
    "an address of another scheme": (provider('base_url = "ftp://a.example"'), "must be an address like"),
    "an address with a space": (provider('base_url = "https://a.example/v 1"'), "must be an address like"),
    "an address with a line break": (provider('base_url = "https://a.example/v1\\r\\nx: y"'), "must be an address"),
    "an address with a query": (provider('base_url = "https://a.example/v1?x=1"'), "no user, query or fragment"),
    "an address with a user": (provider('base_url = "https://me:pw@a.example/v1"'), "no user, query or fragment"),
    "an address with a bad port": (provider('base_url = "https://a.example:99999/v1"'), "must be an address like"),
    "an address with port 0": (provider('base_url = "https://a.example:0/v1"'), "must be an address like"),
    **{f"an address with its endpoint {tail}": (provider(f'base_url = "https://a.example/v1/{tail}"'), "which Pomex appends.")
       for tail in ("chat/completions", "responses/", "messages")},
    **{f"an address without host {url}": (provider(f'base_url = "{url}"'), "must be an address like")
       for url in ("https://", "https:///v1", "https://:80/v1", "https://[::1/v1")},
    "a key over plain http": (provider('base_url = "http://llm.example.com/v1"\napi_key = "k"'),
                              "plain http would expose the API key; use https."),
    "two keys": (provider('env_key = "OPENAI_API_KEY"\napi_key = "k"'),
                 "pomex.toml: [providers.x] has both env_key and api_key; keep one."),
    "a variable that is not set": (
        "[providers.openai]\napi_key = \"env:OPENAI_KEY\"\n",
        'pomex.toml: [providers.openai] api_key = "env:OPENAI_KEY": that variable is not set. Did you '
        'mean OPENAI_API_KEY?'),
    "a variable that is not set, and nothing near": (
        provider('env_key = "ZZZ"'), 'pomex.toml: [providers.x] env_key = "ZZZ": that variable is not set.'),
    "a built-in without its key": (
        "[providers.groq]\n", 'pomex.toml: [providers.groq] env_key = "GROQ_API_KEY": that variable is not set'),
    "a file that is not there": (
        provider('api_key = "file:/run/x"'),
        'pomex.toml: [providers.x] api_key = "file:/run/x": that file cannot be read (No such file or '
        'directory).'),
    "a file with nothing in it": (provider('api_key = "file:/empty"'), "the key is empty, or"),
    "a key with a space": (provider('api_key = "sk secret"'),
                           "api_key = (hidden): the key is empty, or has a space or a character not allowed in keys."),
    "a key that is a number": (provider("api_key = 12345"), "api_key = (hidden): must be a string, not an integer."),
    "a header from an unset variable": (
        provider('env_http_headers = { "x-key" = "NOT_SET" }'),
        'pomex.toml: [providers.x.env_http_headers] x-key = "NOT_SET": that variable is not set'),
    "a header with a line break": (provider('http_headers = { "x-a" = "1\\r\\nhost: evil" }'),
                                   "a header needs a plain name and a value of one line."),
    "a header with a bad name": (provider('http_headers = { "x a" = "1" }'), "a header needs a plain name"),
    "headers that are a list": (provider("http_headers = []"),
                                'http_headers = (hidden): must be a table of strings, like { "name" = "value" }.'),
    "a fact that no model has": (provider('overrides = { "m" = { think_tag = false } }'), "Did you mean think_tags?"),
    "a fact of another type": (provider('overrides = { "m" = { think_tags = 1 } }'), "think_tags = 1: must be true or false, not an integer."),
    "a fact that is no single value": (provider('overrides = { "m" = { passthrough_fields = [] } }'), 'unknown key "passthrough_fields"'),
    "a fact where none counts": (provider('wire_api = "responses"\noverrides = { "m" = { max_tokens = 3 } }'), 'unknown key "max_tokens"'),
    "an unknown dialect": (provider('dialect = "klingon"'), 'dialect = "klingon": must be one of '),
    "a proxy without port": (provider('proxy = "http://proxy.example"'),
                             'must be "off", "env" or an address like "http://proxy.example:3128".'),
    # of models
    "a model without its provider": ('[models."gpt-5"]\n',
                                     'pomex.toml: model name "gpt-5": it must be like "openai/gpt-5.3-codex", or have targets.'),
    "a target that is none": ('[models."a/b"]\ntargets = ["openai"]\n',
                              'pomex.toml: [models."a/b"] targets = ["openai"]: must be a list of '
                              '"provider:model"; a list inside it is one tier.'),
    "an empty tier": ('[models."a/b"]\ntargets = [[]]\n', "must be a list of"),
    "tiers in tiers": ('[models."a/b"]\ntargets = [["a:b", ["c:d"]]]\n', "[0][1] must be a string, not an array."),
    "a target nobody serves": (
        provider("", "azure") + '[models."a/b"]\ntargets = ["azur:m"]\n',
        'pomex.toml: [models."a/b"] targets: "azur:m" names no configured provider. Did you mean azure?'),
    "a target of a provider that is not in the file": (
        '[demo]\nenabled = false\n[models."a/b"]\ntargets = ["openai:m"]\n',
        'pomex.toml: [models."a/b"] targets: "openai:m" names no configured provider. Add [providers.openai].'),
}


@pytest.mark.parametrize("text, sentence", COMPLAINTS.values(), ids=COMPLAINTS)
def test_a_complaint_names_the_place_the_value_and_what_would_do(text, sentence):
    with pytest.raises(pomex.ConfigError) as caught:
        load(text)
    message = str(caught.value)
    assert message.startswith(sentence) if sentence.startswith("pomex.toml") else sentence in message
    assert "secret" not in message


def test_nothing_at_all_gives_the_defaults_and_a_database_in_the_state_folder():
    config = pomex.load_config("", "", {"HOME": "/home/me"})
    assert config.database.url == "sqlite:/home/me/.local/state/pomex/pomex.db"
    assert (config.server, config.models, config.path) == (pomex.ServerConfig(), {}, "")
    assert [*config.providers] == ["demo"]
    assert pomex.load_config("", "", {"XDG_STATE_HOME": "/s"}).database.place == "/s/pomex/pomex.db"


DATABASES = {
    "beside the file": ("", "/etc/pomex/pomex.toml", "/etc/pomex/pomex.db"),
    "beside a file here": ("", "pomex.toml", "pomex.db"),
    "where the file says, from where it lies": ('[database]\nurl="sqlite:d/p.db"', "/etc/p.toml", "/etc/d/p.db"),
    "absolute": ('[database]\nurl="sqlite:/var/p.db"', "/etc/p.toml", "/var/p.db"),
    "at home": ('[database]\nurl="sqlite:~/p.db"', "/etc/p.toml", "/home/me/p.db"),
}


@pytest.mark.parametrize("text, name, path", DATABASES.values(), ids=DATABASES)
def test_the_database_lies(text, name, path):
    assert load(text, name).database.place == path


def test_a_variable_wins_over_the_file():
    environ = {**ENVIRON, "POMEX_PORT": "81", "POMEX_PUBLIC_HOSTS": "a.example, b.example", "POMEX_HEARTBEAT_S": "2.5",
               "POMEX_DATABASE_URL": "sqlite:/v.db", "POMEX_HOST": "", "POMEX_API_KEY": "sk-rh-of-a-client"}
    config = load('[server]\nport = 80\nhost = "::1"\n', environ=environ)
    assert (config.server.port, config.server.host, config.server.heartbeat_s) == (81, "::1", 2.5)
    assert config.server.public_hosts == ("a.example", "b.example")
    assert config.database.place == "/v.db"
    with pytest.raises(pomex.ConfigError, match='^POMEX_PORT must be an integer, not a string.$'):
        load("", environ={"POMEX_PORT": "x"})


KEYS = {
    "from a variable": ('env_key = "OPENAI_API_KEY"', "sk-openai-0123456789", "env:OPENAI_API_KEY"),
    "from a variable, said the other way": ('api_key = "env:OPENAI_API_KEY"', "sk-openai-0123456789",
                                            "env:OPENAI_API_KEY"),
    "from a file, without its line end": ('api_key = "file:/run/secrets/elsewhere"', "file-key",
                                          "file:/run/secrets/elsewhere"),
    "from a file beside the configuration": ('api_key = "file:near"', "near-key", "file:near"),
    "from a file at home": ('api_key = "file:~/key"', "home-key", "file:~/key"),
    "from the text": ('api_key = "sk-${HOME}"', "sk-${HOME}", "conf/pomex.toml"),
    "from nowhere": ("", "", ""),
}


@pytest.mark.parametrize("line, key, source", KEYS.values(), ids=KEYS)
def test_a_key_comes(line, key, source):
    row = load(provider(line), "conf/pomex.toml").providers["x"]
    assert (row.api_key, row.key_source) == (key, source)


def test_a_secret_is_in_no_repr():
    config = load(provider('api_key = "s3cret"\nhttp_headers = { a = "s3cret" }\nquery_params = { a = "s3cret" }\n'
                           'proxy = "http://me:s3cret@p.example:1"'))
    assert "s3cret" not in repr(config) and config.providers["x"].proxy == "http://me:s3cret@p.example:1"


def test_headers_from_variables_join_the_others():
    row = load(provider('http_headers = { a = "1" }\nenv_http_headers = { "api-key" = "AZURE_OPENAI_API_KEY" }')
               ).providers["x"]
    assert row.http_headers == {"a": "1", "api-key": "azure-key"}


HOSTS = {
    "http://127.0.0.1:8000/v1": True, "http://[::1]:8000/v1": True, "http://localhost/v1": True,
    "http://10.0.0.7:8000/v1/": True, "http://192.168.1.2/v1": True, "http://ollama:11434/v1": True,
    "http://gpu.internal/v1": True, "https://llm.example.com": False, "https://8.8.8.8/v1": False,
    "http://llm.example.com/v1": False,
}


@pytest.mark.parametrize("url, local", HOSTS.items())
def test_an_address_is_local_or_not_and_clear_text_abroad_is_warned_of(url, local):
    config = load(provider(f'base_url = "{url}"'))
    assert config.providers["x"].local is local
    assert config.providers["x"].base_url == url.rstrip("/")
    assert bool(config.warnings) is (url == "http://llm.example.com/v1")


def test_a_built_in_provider_needs_only_what_differs():
    row = load("[providers.openai]\nidle_timeout_s = 9\n").providers["openai"]
    assert (row.wire_api, row.relay, row.idle_timeout_s) == ("responses", "bytes", 9.0)
    assert row.api_key == "sk-openai-0123456789"


def test_the_key_of_a_built_in_provider_goes_to_no_other_address():
    row = load('[providers.openai]\nbase_url = "https://elsewhere.example/v1"\n').providers["openai"]
    assert (row.api_key, row.relay, row.wire_api) == ("", "normalise", "responses")


def test_targets_are_tiers_and_split_at_the_first_colon():
    config = load(provider("", "a") + provider("", "b")
                  + '[models."m/n"]\ntargets = ["a:x", ["b:qwen3:8b", "a:y"]]\ncontext_window = 9\n')
    model = config.models["m/n"]
    assert model.targets == ((pomex.Target("a", "x"),), (pomex.Target("b", "qwen3:8b"), pomex.Target("a", "y")))
    assert model.context_window == 9


def test_the_demo_is_there_unless_it_is_switched_off():
    assert load("").providers["demo"].wire_api == "demo"
    assert load("[demo]\nenabled = false\n").providers == {}


def test_configurations_are_compared_by_value():
    assert load("") == load("") != load("[server]\nport = 1\n")


def test_what_is_in_the_environment_is_detected():
    found = pomex.detect_providers({"OPENAI_API_KEY": " sk-1\n", "GROQ_API_KEY": "", "XAI_API_KEY": "with space"})
    assert {name: (row.api_key, row.key_source) for name, row in found.items()} == {
        "openai": ("sk-1", "env:OPENAI_API_KEY")}


def test_every_built_in_provider_is_one_that_a_file_could_describe():
    for row in pomex.BUILTIN_PROVIDERS.values():
        assert pomex.PROVIDER_NAME.fullmatch(row.name)
        assert (pomex.read_base_url(row.base_url), pomex.is_private(row.base_url)) == (row.base_url, row.local)
        assert not row.dialect or row.dialect in pomex.DIALECTS


# --- the example file -----------------------------------------------------------------------------

def example():
    return (REPOSITORY / "pomex.toml.example").read_text(encoding="utf-8")


def test_the_example_is_the_defaults():
    shown, plain = load(example()), load("")
    assert (shown.server, shown.database, shown.demo) == (plain.server, plain.database, plain.demo)
    assert shown.providers == plain.providers and shown.models == {}


def test_the_example_names_every_key_and_its_commented_half_loads_too():
    text = re.sub(r"^#(?=\S)", "", example(), flags=re.MULTILINE)
    config = load(text)
    assert len(config.providers) == 5 and len(config.models) == 1
    for section, rows in (("server", pomex.ServerConfig), ("database", pomex.DatabaseConfig),
                          ("demo", pomex.DemoConfig)):
        assert pomex.tomllib.loads(example())[section].keys() == pomex.config_fields(rows).keys()
    for section, rows in pomex.NAMED_SECTIONS.items():
        assert text.count(f"[{section}.")
        written = [key for table in pomex.tomllib.loads(text)[section].values() for key in table]
        assert set(written) == pomex.config_fields(rows).keys()


def test_every_key_has_its_reading_and_its_meaning():
    for rows in (*pomex.SECTIONS.values(), *pomex.NAMED_SECTIONS.values()):
        for key in pomex.config_fields(rows).values():
            assert key.meaning and key.types[-1] in pomex.JSON_NAMES
