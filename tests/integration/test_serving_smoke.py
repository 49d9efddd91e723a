"""The thread through everything in seconds: one command, then the tokens of a reference over HTTP and gRPC."""

from __future__ import annotations

import json
from typing import Any

import grpc
import torch

from engine.checkpoint.reader import open_checkpoint
from rorqual.v1 import generate_pb2 as pb
from tests.harness.system import SECONDS_MAX, System
from tests.reference.deepseek_v4 import ReferenceModel

PROMPT = [7, 100_000, 42, 128, 5]
NUM_TOKENS = 6


def test_one_command_serves_what_the_reference_computes(text_system: System, text_model: Any) -> None:
    checkpoint = open_checkpoint(text_model)
    model = ReferenceModel(checkpoint.config, dict(checkpoint.tensors()), "float32")
    logits = torch.stack([model.step(token) for token in PROMPT])[-1]
    wanted: list[int] = []
    while len(wanted) < NUM_TOKENS:
        wanted.append(int(logits.argmax()))
        logits = model.step(wanted[-1])
    (choice,) = text_system.complete(PROMPT, max_tokens=NUM_TOKENS)["choices"]
    assert choice["token_ids"] == wanted
    with grpc.insecure_channel(text_system.grpc) as channel:
        call = channel.unary_stream(
            "/rorqual.v1.Generation/Generate",
            pb.GenerateRequest.SerializeToString,
            pb.GenerateResponse.FromString,
        )
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=PROMPT),
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            sampling=pb.Sampling(temperature=0),
        )
        responses = list(call(request, timeout=SECONDS_MAX))
    assert [token.token_id for response in responses for token in response.tokens] == wanted
    assert "".join(response.text for response in responses) == choice["text"]


def test_a_chat_streams(text_system: System) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "stream": True, "seed": 1}
    with (
        text_system.client() as client,
        client.stream("POST", "/v1/chat/completions", json=body | {"ignore_eos": True}) as answer,
    ):
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert choices[0]["delta"]["role"] == "assistant"
    assert "".join(choice["delta"].get("content", "") for choice in choices)
    assert choices[-1]["finish_reason"] == "length"
    text_system.wait_until_idle()
