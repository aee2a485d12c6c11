"""The gateway's API as OpenAPI 3.1: what it checks itself. Other parameters of vLLM are passed through."""

from __future__ import annotations

from typing import Any

import msgspec

import penstock

_SAMPLING: dict[str, Any] = {
    "model": {"type": "string"},
    "stream": {"type": "boolean"},
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": {"type": "boolean"}, "continuous_usage_stats": {"type": "boolean"}},
    },
    "max_tokens": {"type": "integer", "minimum": 1},
    "min_tokens": {"type": "integer", "minimum": 0},
    "temperature": {"type": "number", "minimum": 0},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 1024},
    "seed": {"type": ["integer", "null"]},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
    "ignore_eos": {"type": "boolean"},
    "return_token_ids": {"type": "boolean"},
    "stop": {
        "oneOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 64},
            {"type": "null"},
        ]
    },
    "penstock": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "class": {"type": "string", "minLength": 1, "maxLength": 64},
            "slo": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "ttft_ms": {"type": "number", "exclusiveMinimum": 0},
                    "tpot_ms": {"type": "number", "exclusiveMinimum": 0},
                },
            },
        },
    },
}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT = {"oneOf": [{"type": "string", "minLength": 1}, _IDS]}
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": {"type": "string"}},
    },
}
_ANSWERS = {
    "200": {"description": "The answer: JSON, or server-sent events where stream is true"},
    "400": {"description": "The request cannot be read or served"},
    "401": {"description": "The API key is missing or wrong"},
    "404": {"description": "No such model"},
    "429": {"description": "Too many requests; see Retry-After"},
    "502": {"description": "The model servers failed"},
    "503": {"description": "No model server is available"},
}


def _post(summary: str, required: str, properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "required": [required], "properties": {**properties, **_SAMPLING}}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"post": {"summary": summary, "requestBody": body, "responses": _ANSWERS}}


def _get(summary: str) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": {"200": {"description": "OK"}}}}


def document() -> dict[str, Any]:
    """The description as plain JSON types."""
    chat = {"messages": _MESSAGES, "max_completion_tokens": {"type": "integer", "minimum": 1}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penstock gateway", "version": penstock.__version__},
        "paths": {
            "/v1/completions": _post("Complete a prompt", "prompt", {"prompt": _PROMPT}),
            "/v1/chat/completions": _post("Answer a chat", "messages", chat),
            "/v1/models": _get("The model served"),
            "/health": _get("The gateway lives"),
            "/ready": _get("An engine can take requests"),
            "/metrics": _get("Prometheus metrics"),
        },
    }


def description() -> bytes:
    """The same as JSON."""
    return msgspec.json.encode(document())
