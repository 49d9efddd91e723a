"""Kubernetes' protobuf envelope, as Helm 4 sends Secrets in it and kubectl questions about rights. Decoding only."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\x00"


def decode(body: bytes) -> dict[str, Any]:
    """Raises ValueError for other kinds: those come as JSON or are refused."""
    assert body.startswith(MAGIC), "no Kubernetes protobuf"
    type_meta, raw = b"", b""
    for number, value in _fields(body[len(MAGIC) :]):
        if number == 1:
            type_meta = value
        elif number == 2:
            raw = value
    names = {number: value.decode() for number, value in _fields(type_meta)}
    match names.get(2):
        case "Secret":
            return _secret(raw)
        case "SelfSubjectAccessReview":
            return _review(raw)
        case other:
            raise ValueError(f"protobuf of {other} is not understood")


def _secret(raw: bytes) -> dict[str, Any]:
    item: dict[str, Any] = {"apiVersion": "v1", "kind": "Secret", "metadata": {}}
    for number, value in _fields(raw):
        match number:
            case 1:
                item["metadata"] = _metadata(value)
            case 2 | 4:  # data, stringData
                key, data = _entry(value)
                item.setdefault("data", {})[key] = base64.b64encode(data).decode()
            case 3:
                item["type"] = value.decode()
            case 5:
                item["immutable"] = bool(value)
    return item


def _review(raw: bytes) -> dict[str, Any]:
    names = {1: "namespace", 2: "verb", 3: "group", 4: "version", 5: "resource", 6: "subresource", 7: "name"}
    spec = dict(_fields(raw)).get(2, b"")
    asked = {
        names[number]: value.decode()
        for number, value in _fields(dict(_fields(spec)).get(1, b""))
        if number in names
    }
    return {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": asked},
    }


def _metadata(body: bytes) -> dict[str, Any]:
    names = {1: "name", 2: "generateName", 3: "namespace", 5: "uid", 6: "resourceVersion"}
    found: dict[str, Any] = {}
    for number, value in _fields(body):
        if number in names and value:
            found[names[number]] = value.decode()
        elif number in (11, 12):
            key, text = _entry(value)
            found.setdefault("labels" if number == 11 else "annotations", {})[key] = text.decode()
    return found


def _entry(body: bytes) -> tuple[str, bytes]:
    fields = dict(_fields(body))
    return fields.get(1, b"").decode(), fields.get(2, b"")


def _fields(body: bytes) -> Iterator[tuple[int, Any]]:
    place = 0
    while place < len(body):
        tag, place = _varint(body, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(body, place)
            yield number, value
        elif wire == 2:
            length, place = _varint(body, place)
            yield number, body[place : place + length]
            place += length
        else:
            raise ValueError(f"wire type {wire} is not understood")


def _varint(body: bytes, place: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = body[place]
        place += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, place
        shift += 7
