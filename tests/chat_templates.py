"""Chat templates in the manner of several families, and conversations to render with them."""

CHATML = """\
{%- for message in messages -%}
    {{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
DEFAULT_SYSTEM = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
HEADERS = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set said, rest = messages[0]['content']|trim, messages[1:] %}
{%- else %}
    {%- set said, rest = 'Answer briefly.', messages %}
{%- endif %}
{{- '<|start|>system<|end|>\\n\\n' + said + '<|eot|>' }}
{%- for message in rest %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
"""
ALTERNATING = """\
{%- for message in messages %}
{%- if message.role not in ('user', 'assistant') %}{{ raise_exception('no role ' + message.role) }}{% endif %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must take turns.') }}{% endif %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}
"""
THOUGHTS = """\
{%- set ns = namespace(asked=-1) %}
{%- for message in messages[::-1] %}
    {%- if ns.asked < 0 and message.role == 'user' %}{%- set ns.asked = messages|length - 1 - loop.index0 %}{%- endif %}
{%- endfor %}
{%- macro said(role, content) %}{{ '<|im_start|>' + role + '\\n' + content + '<|im_end|>\\n' }}{% endmacro %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'tool' %}{%- continue %}{%- endif %}
    {%- if message.role == 'assistant' and loop.index0 > ns.asked %}
        {%- set thought = (message.thought or '') | trim('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {{- said('assistant', '<think>\\n' + thought + '\\n</think>\\n\\n' + content) }}
    {%- else %}
        {{- said(message['role'], content) }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
ROLES = (
    "{% for m in messages %}{{ m.role|capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "default system": DEFAULT_SYSTEM,
    "headers": HEADERS,
    "alternating": ALTERNATING,
    "thoughts": THOUGHTS,
    "roles": ROLES,
}
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "[INST]", "[/INST]"]


def messages(*contents, system=None):
    """A conversation in turns, the user's first."""
    said = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return said if system is None else [{"role": "system", "content": system}, *said]


CONVERSATIONS = {
    "one question": messages("Hello, how are you?"),
    "a turn": messages("What is 2 + 2?", "4"),
    "three turns": messages(
        "Hello, how are you?",
        "I'm doing great.",
        "Show me\n\n chat templating! ",
        " Gladly:\n\n{{ x }}",
        "ok",
        "Größe 🙂",
    ),
    "with a system": messages("Who are you?", "<b>A parrot</b> & 'more'", "Again?", "A parrot.", system=" A parrot. "),
}
