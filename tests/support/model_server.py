"""A small server with vLLM's answers over a transformers model: real HTTP on loopback, for tests of a served teacher.

It answers `/v1/models`, `/tokenize` and, as vLLM 0.32 does, either `/pooling` or `/v1/completions`; `tests/support/recorded_vllm.json` holds
answers of the real one, and a test compares their form. `faults` make it fail as servers do.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ServedTeacher:
    """What the server runs, and how it misbehaves."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = "tiny"
    max_length: int = 512
    max_logprobs: int = 20
    pooling: bool = True
    """started with --runner pooling, else to generate text"""
    dtype: torch.dtype = torch.float32
    """in which it computes"""
    root: str = "/models/tiny"
    key: str | None = None
    normalized: bool = False
    """pooling that normalises, as without use_activation false"""
    fault: Callable[[int, str], str | None] = lambda number, path: None
    """from the number of the request and its path: slow, close, cut, 500, 429, nan, html, short, logits, swapped; None answers rightly"""
    requests: list[str] = field(default_factory=list)

    @torch.no_grad()
    def hidden(self, ids: list[int]) -> Tensor:
        """(n, D) what enters the head."""
        base: Any = self.model.base_model
        states = base(input_ids=torch.tensor([ids])).last_hidden_state[0].to(self.dtype).float()
        return torch.nn.functional.normalize(states, dim=-1) if self.normalized else states

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> Tensor:
        """(n, V) log-probabilities of what follows each token."""
        return self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)


@contextmanager
def serving(teacher: ServedTeacher, port: int = 0) -> Iterator[str]:
    """Serve on loopback; the address of the server."""
    handler = type("Handler", (_Handler,), {"teacher": teacher})
    # Many clients connect at once; with the default of 5 a loaded machine resets some of them.
    listener = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 128})
    server = listener(("127.0.0.1", port), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    teacher: ServedTeacher
    protocol_version = "HTTP/1.1"
    _model_lock = threading.Lock()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict[str, Any] | None) -> None:
        teacher = self.teacher
        if body == {}:  # asks what there is
            known = self.path in ("/tokenize", "/pooling" if teacher.pooling else "/v1/completions")
            return self._refuse(*((400, "Field required") if known else (404, "Not Found")))
        with self._model_lock:
            teacher.requests.append(self.path)
            fault = teacher.fault(len(teacher.requests), self.path)
        if fault == "close":
            self.close_connection = True
            return
        if fault in ("500", "429"):
            return self._refuse(int(fault), "overloaded")
        if fault == "slow":
            time.sleep(1.5)
        if fault == "html":
            return self._write(200, b"<html>a proxy</html>", {"Content-Type": "text/html"})
        if teacher.key is not None and self.headers.get("Authorization") != f"Bearer {teacher.key}":
            return self._refuse(401, "Unauthorized")
        routes = {"/v1/models": self._models, "/tokenize": self._tokenize}
        routes |= {"/pooling": self._pool} if teacher.pooling else {"/v1/completions": self._complete}
        if self.path not in routes:
            return self._refuse(404, "Not Found")
        if body is not None and body.get("model") != teacher.name:
            return self._refuse(404, f"The model `{body.get('model')}` does not exist.")
        with self._model_lock:
            routes[self.path](body or {}, fault)

    def _models(self, body: dict[str, Any], fault: str | None) -> None:
        model = {
            "id": self.teacher.name,
            "object": "model",
            "root": self.teacher.root,
            "max_model_len": self.teacher.max_length,
        }
        self._json({"object": "list", "data": [model]})

    def _tokenize(self, body: dict[str, Any], fault: str | None) -> None:
        ids = self.teacher.tokenizer(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))[
            "input_ids"
        ]
        self._json(
            {"count": len(ids), "max_model_len": self.teacher.max_length, "tokens": ids, "token_strs": None}
        )

    def _pool(self, body: dict[str, Any], fault: str | None) -> None:
        ids = body["input"][0]
        if len(ids) > self.teacher.max_length:
            return self._refuse(
                400, f"This model's maximum context length is {self.teacher.max_length} tokens. However, ..."
            )
        states = self.teacher.hidden(ids)
        if fault == "nan":
            states[0, 0] = float("nan")
        if fault == "short":
            states = states[:-1]
        if body.get("encoding_format") != "bytes":
            data = [{"index": 0, "object": "pooling", "data": states.tolist()}]
            return self._json({"id": "pooling-0", "object": "list", "created": 0, "model": self.teacher.name, "data": data,
                               "usage": {"prompt_tokens": len(ids), "total_tokens": len(ids)}})  # fmt: skip
        content = states.to(DTYPES[body["embed_dtype"]]).contiguous().view(torch.uint8).numpy().tobytes()
        described = {
            "id": "pooling-0",
            "created": 0,
            "model": self.teacher.name,
            "data": [
                {
                    "index": 0,
                    "embed_dtype": body["embed_dtype"],
                    "endianness": body.get("endianness", "native"),
                    "start": 0,
                    "end": len(content),
                    "shape": list(states.shape),
                }
            ],
            "usage": {"prompt_tokens": len(ids), "total_tokens": len(ids)},
        }
        if fault == "cut":
            content = content[: len(content) // 2]
        self._write(
            200, content, {"Content-Type": "application/octet-stream", "metadata": json.dumps(described)}
        )

    def _complete(self, body: dict[str, Any], fault: str | None) -> None:
        teacher, ids, k = self.teacher, body["prompt"], body["prompt_logprobs"]
        if k > teacher.max_logprobs:
            return self._refuse(
                400,
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {teacher.max_logprobs} "
                f"(parameter=prompt_logprobs, value={k})",
            )
        if len(ids) + 1 > teacher.max_length:
            return self._refuse(
                400,
                f"The decoder prompt (length {len(ids)}) plus the number of requested output tokens (at least 1) is longer than "
                f"the maximum model length of {teacher.max_length}.",
            )
        table = teacher.logprobs(ids)
        if fault == "nan":
            table[0] = float("nan")
        if fault == "logits":
            table = table + 30.0
        order = table.argsort(dim=-1, descending=True, stable=True)
        ranks = torch.empty_like(order).scatter_(
            1, order, torch.arange(1, table.shape[1] + 1).expand_as(order)
        )
        entries: list[dict[str, Any] | None] = [None]
        for i, token in enumerate(ids[1:]):
            numbers = list(dict.fromkeys([token, *order[i, :k].tolist()]))
            entries.append(
                {
                    str(number): {
                        "logprob": float(table[i, number]),
                        "rank": int(ranks[i, number]),
                        "decoded_token": teacher.tokenizer.decode([number]),
                    }
                    for number in numbers
                }
            )
        best = order[-1, : body["logprobs"]].tolist()
        generated = {
            "text_offset": [0],
            "token_logprobs": [float(table[-1, best[0]])],
            "tokens": [f"token_id:{best[0]}"],
            "top_logprobs": [{f"token_id:{number}": float(table[-1, number]) for number in best}],
        }
        if fault == "short":
            entries.pop()
        choice = {
            "index": 0,
            "text": teacher.tokenizer.decode(best[:1]),
            "logprobs": generated,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
            "prompt_logprobs": entries,
            "prompt_token_ids": (ids[::-1] if fault == "swapped" else ids)
            if body.get("return_token_ids")
            else None,
        }
        content = {
            "id": "cmpl-0",
            "object": "text_completion",
            "created": 0,
            "model": teacher.name,
            "choices": [choice],
        }
        self._json(content, cut=fault == "cut")

    def _json(self, content: Any, *, cut: bool = False) -> None:
        encoded = json.dumps(content).encode()
        if cut:
            self._write(
                200, encoded[: len(encoded) // 2], {"Content-Type": "application/json"}, length=len(encoded)
            )
            self.close_connection = True
            return
        self._write(200, encoded, {"Content-Type": "application/json"})

    def _refuse(self, status: int, message: str) -> None:
        error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
        self._write(status, json.dumps({"error": error}).encode(), {"Content-Type": "application/json"})

    def _write(self, status: int, content: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        with suppress(BrokenPipeError, ConnectionResetError):  # a client that waits no longer
            self.end_headers()
            self.wfile.write(content)
