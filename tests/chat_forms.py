"""Chat templates that take tools, in the forms that models write calls in, for tests."""

HERMES = """{% if tools %}<|im_start|>system
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}{% for m in messages %}{% if m.role == "tool" %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA = """{{ bos_token }}{% for m in messages %}{% if "tool_calls" in m %}\
{% if m.tool_calls | length != 1 %}{{ raise_exception("one call at a time") }}{% endif %}\
<|start|>assistant<|end|>{"name": "{{ m.tool_calls[0].function.name }}", \
"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eot|>{% elif m.role == "tool" %}\
<|start|>ipython<|end|>{{ m.content | tojson }}<|eot|>{% else %}<|start|>{{ m.role }}<|end|>\
{% if loop.first and tools is not none %}Answer with {"name": function name, "parameters": its arguments}.\
{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{% endif %}{{ m.content | trim }}<|eot|>\
{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == "user" %}\
{% if tools is not none and loop.first %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}\
[INST]{{ m.content }}[/INST]{% elif m.role == "tool" %}\
[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]\
{% elif m.tool_calls is defined %}[TOOL_CALLS][{% for call in m.tool_calls %}\
{% if call.id is not defined or call.id | length != 9 %}{{ raise_exception("ids have nine characters") }}\
{% endif %}{{ call.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}\
{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""
XML = """{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}{{ m.content }}\
{% for call in m.tool_calls %}<tool_call><function={{ call.function.name }}></function></tool_call>\
{% endfor %}{% endfor %}"""
