"""A small HTTP server that speaks the part of vLLM's protocol that is used, on a tiny model.

It samples from a transformers model with processed log-probs, gives ``prompt_logprobs``, loads
weights from a folder, and has a prefix cache of sorts: after new weights it goes on to answer from
the old ones until the cache is reset. ``faults`` are what can go wrong, one request each.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase


class FakeVLLM:
    """The engine behind the server; its attributes may be changed by tests."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.answers_with = self.model  # what the prefix cache still belongs to
        self.name = "student"
        self.version = "default"
        self.logprobs_mode = "processed_logprobs"
        self.max_logprobs = 40
        self.stops_at: list[int] = []  # of the server's own defaults
        self.has_dev_mode = True
        self.loads_weights = True
        self.url = ""
        self.faults: list[str] = []  # "drop", "slow", "500", "503": taken by one request each
        self.slow_seconds = 1.0
        self.requests: list[tuple[str, Any]] = []
        self.num_reloads = 0
        self.after_completion = lambda: None
        self._lock = threading.Lock()

    def bodies(self, path: str) -> list[Any]:
        """What was posted to a path."""
        return [body for asked, body in self.requests if asked == path]

    def handle(self, path: str, body: Any) -> tuple[int, Any]:
        with self._lock:
            self.requests.append((path, body))
        plain = {
            "/v1/models": lambda: (200, {"data": [{"id": self.name}]}),
            "/v1/completions": lambda: self._complete(body),
            "/tokenize": lambda: self._tokenize(body),
        }
        dev = {
            "/weight_info": lambda: (200, {"weight_version": self.version}),
            "/update_weight_version": lambda: self._set_version(body),
            "/collective_rpc": lambda: self._rpc(body),
            "/reset_prefix_cache": self._reset,
        }
        known = plain | (dev if self.has_dev_mode else {})
        return known[path]() if path in known else (404, {"detail": "Not Found"})

    def _set_version(self, body: Any) -> tuple[int, Any]:
        self.version = body["new_version"]
        return 200, {"success": True, "new_version": self.version}

    def _rpc(self, body: Any) -> tuple[int, Any]:
        assert body["method"] == "reload_weights"
        folder = Path(body["kwargs"]["weights_path"])
        if not folder.is_dir():
            return 500, {"error": f"no such folder: {folder}"}
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        expected = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        if expected != {name: tensor.shape for name, tensor in loaded.state_dict().items()}:
            return 500, {"error": "size mismatch"}
        if self.loads_weights:
            self.model = loaded
        self.num_reloads += 1
        return 200, {"results": [None]}

    def _reset(self) -> tuple[int, Any]:
        self.answers_with = self.model
        return 200, {"success": True}

    def _tokenize(self, body: Any) -> tuple[int, Any]:
        assert self.tokenizer is not None
        ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return 200, {"tokens": ids.input_ids, "count": len(ids.input_ids)}

    @torch.no_grad()
    def _complete(self, body: Any) -> tuple[int, Any]:
        if body["model"] != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if (body.get("prompt_logprobs") or 0) > self.max_logprobs:
            return 400, {"error": {"message": "Requested prompt logprobs exceed --max-logprobs"}}
        ids, written, logprobs, reason = list(body["prompt"]), [], [], "length"
        generator = torch.Generator().manual_seed(body.get("seed", 0) % 2**63)
        for _ in range(body["max_tokens"]):
            raw = self.answers_with(torch.tensor([ids])).logits[0, -1].double()
            token, logprob = self._draw(raw, body, generator)
            ids.append(token)
            written.append(token)
            logprobs.append(logprob)
            ends = [*(body.get("stop_token_ids") or []), *self.stops_at]
            ends += [] if body.get("ignore_eos") else [self.model.config.eos_token_id]
            if token in ends:
                reason = "stop"
                break
        choice = {
            "index": 0,
            "text": "",
            "token_ids": written,
            "prompt_token_ids": body["prompt"],
            "finish_reason": reason,
            "logprobs": {"token_logprobs": logprobs} if body.get("logprobs") is not None else None,
            "prompt_logprobs": self._of_prompt(body),
        }
        if not body.get("return_token_ids"):
            choice["token_ids"] = choice["prompt_token_ids"] = None
        self.after_completion()
        return 200, {"model": self.name, "choices": [choice]}

    def _draw(self, raw, body, generator) -> tuple[int, float]:
        logits = raw.clone()
        for token, bias in (body.get("logit_bias") or {}).items():
            logits[int(token)] += bias
        if body["temperature"] == 0:
            token = int(logits.argmax())
            return token, float(logits.log_softmax(-1)[token])
        logits = logits / body["temperature"]
        if body.get("top_k"):
            floor = logits.topk(body["top_k"]).values[-1]
            logits[logits < floor] = -torch.inf
        if body.get("top_p", 1.0) < 1:
            probs, order = logits.softmax(-1).sort(descending=True)
            out = order[probs.cumsum(-1) - probs >= body["top_p"]]
            logits[out] = -torch.inf
        token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        source = raw if self.logprobs_mode == "raw_logprobs" else logits
        return token, float(source.log_softmax(-1)[token])

    def _of_prompt(self, body) -> list[dict[str, Any] | None] | None:
        k = body.get("prompt_logprobs")
        if k is None:
            return None
        logprobs = self.answers_with(torch.tensor([body["prompt"]])).logits[0].log_softmax(-1)
        found: list[dict[str, Any] | None] = [None]
        for place, token in enumerate(body["prompt"][1:]):
            row = logprobs[place]
            ids = [*row.topk(min(k, len(row))).indices.tolist(), token]
            found.append(
                {
                    str(i): {"logprob": float(row[i]), "rank": int((row > row[i]).sum()) + 1}
                    for i in reversed(ids)  # the order says nothing
                }
            )
        return found


def _handler(engine: FakeVLLM) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def _answer(self, body: Any) -> None:
            path = self.path.partition("?")[0]
            fault = engine.faults.pop(0) if engine.faults and path == "/v1/completions" else ""
            if fault == "drop":
                self.connection.close()
                return
            if fault == "slow":
                time.sleep(engine.slow_seconds)
            status, answer = engine.handle(path, body)
            if fault.isdigit():
                status, answer = int(fault), {"error": {"message": "EngineDeadError"}}
            content = json.dumps(answer).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client has given up
                pass

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            self._answer(json.loads(self.rfile.read(size)))

    return Handler


@contextmanager
def serving(engine: FakeVLLM):
    """The engine behind a free port of this machine, for as long as the block lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(engine))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    engine.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield engine
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
