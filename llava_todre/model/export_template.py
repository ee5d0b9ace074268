"""Conversation templates in the notation of transformers: Jinja."""

from __future__ import annotations

import json
import re

from llava_todre.model.prompt import DEFAULT_IMAGE_TOKEN, Template

_JINJA = """\
{{- BEGIN -}}
{%- if messages[0]['role'] != 'system' -%}{{- OPENING -}}{%- endif -%}
{%- set asked = namespace(before='') -%}
{%- for message in messages -%}
{%- set role = message['role'] -%}
{%- if role == 'system' -%}{{- BEFORE -}}
{%- elif role == 'user' -%}{{- asked.before -}}{%- set asked.before = QUESTION -%}
{%- else -%}{{- ANSWER -}}
{%- endif -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- set said = namespace(text=false) -%}
{%- for item in message['content'] -%}
{%- set behind = loop.previtem is defined and loop.previtem['type'] == 'image' -%}
{%- if item['type'] == 'image' -%}
{{- (BETWEEN if behind else ' ' if said.text else '') + IMAGE -}}
{%- elif item['type'] == 'text' -%}
{{- ((' ' if said.text else END) if behind else '') + item['text'] -}}
{%- set said.text = true -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- AFTER if role == 'system' else ASKED if role == 'user' else ANSWERED -}}
{%- if role == 'user' and loop.last -%}{{- OPEN -}}{%- endif -%}
{%- endfor -%}
"""
_NO_SYSTEM = "raise_exception('this model knows no system prompt')"


def as_jinja(template: Template, begin: str = "bos_token") -> str:
    """Return a template in the notation of transformers, for conversations of any length.

    Images stand where the content has them; those in front of all text as LLaVA has them. After a
    question it always goes on with what opens the answer.

    Args:
        template: with a system prompt of its own, which a message of the role system replaces.
        begin: what begins every prompt, a Jinja expression.
    """
    before, slot, after = template.first.partition("{system}")
    values = {
        "BEGIN": begin,
        "OPENING": json.dumps(template.opening),
        "BEFORE": json.dumps(before) if slot else _NO_SYSTEM,
        "AFTER": json.dumps(after),
        "BETWEEN": json.dumps(template.images[0]),
        "END": json.dumps(template.images[1]),
        "IMAGE": json.dumps(DEFAULT_IMAGE_TOKEN),
        "QUESTION": json.dumps(template.question[0]),
        "ASKED": json.dumps(template.question[1]),
        "ANSWER": json.dumps(template.answer[0]),
        "ANSWERED": json.dumps(template.answer[1]),
        "OPEN": json.dumps(template.open),
    }
    return re.sub(r"\b[A-Z]{3,}\b", lambda name: values[name[0]], _JINJA).rstrip()
