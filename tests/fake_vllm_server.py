"""A small HTTP server that speaks the part of vLLM's protocol that is used, on a tiny model.

It samples from a transformers model with processed log-probs, gives ``prompt_logprobs``, loads
weights from a folder, and has a prefix cache of sorts: after new weights it goes on to answer from
the old ones until the cache is reset. ``faults`` are what can go wrong, one request each.

As vLLM 0.32 it drops its weights before it reads new ones: after weights that do not fit it answers
every request but a completion, and the first completion ends it, unless others were loaded before.
Responses that have no room are cut; limits above the context, temperatures above 2, seeds beyond
2^63 - 1 and ids without a row are a 400; log-probabilities below -9999 are -9999.
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
    """Engine of the fake server; tests may change its attributes."""

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
        self.stay_old: tuple[str, ...] = ()  # names of weights that a reload does not reach
        self.root: str | None = None
        self.max_model_len = 4096
        self.describes_itself = True  # /server_info
        self.quantization: str | None = None
        self.device = "cuda"
        self.is_wrecked = False  # has no weights
        self.is_dead = False
        self.url = ""
        self.faults: list[str] = []  # "drop", "slow", "500", "503": taken by one request each
        self.slow_seconds = 1.0
        self.requests: list[tuple[str, Any]] = []
        self.num_reloads = 0
        self.after_completion = lambda: None
        self._lock = threading.Lock()

    def bodies(self, path: str) -> list[Any]:
        """Return the bodies that were posted to a path."""
        return [body for asked, body in self.requests if asked == path]

    def handle(self, target: str, body: Any) -> tuple[int, Any]:
        path = target.partition("?")[0]  # what is answered does not depend on the rest
        with self._lock:
            self.requests.append((path, body))
        plain = {
            "/v1/models": lambda: (200, {"object": "list", "data": [self._card()]}),
            "/v1/completions": lambda: self._complete(body),
            "/tokenize": lambda: self._tokenize(body),
        }
        dev = {
            "/weight_info": lambda: (200, {"weight_version": self.version}),
            "/update_weight_version": lambda: self._set_version(body),
            "/collective_rpc": lambda: self._rpc(body),
            "/reset_prefix_cache": self._reset,
        }
        if self.describes_itself:
            dev["/server_info"] = lambda: (200, self._description())
        known = plain | (dev if self.has_dev_mode else {})
        return known[path]() if path in known else (404, {"detail": "Not Found"})

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "root": self.root, "max_model_len": self.max_model_len}

    def _description(self) -> dict[str, Any]:
        model = {
            "model": self.root,
            "dtype": str(self.model.dtype),
            "logprobs_mode": self.logprobs_mode,
            "max_logprobs": self.max_logprobs,
            "max_model_len": self.max_model_len,
            "quantization": self.quantization,
        }
        config = {"model_config": model, "device_config": {"device": self.device}}
        return {"vllm_config": config, "vllm_env": {}, "system_env": {}}

    def _set_version(self, body: Any) -> tuple[int, Any]:
        self.version = body["new_version"]
        return 200, {"success": True, "new_version": self.version}

    def _rpc(self, body: Any) -> tuple[int, Any]:
        assert body["method"] == "reload_weights"
        folder = Path(body["kwargs"]["weights_path"])
        self.is_wrecked = True
        if not folder.is_dir():
            return 500, {"error": f"no such folder: {folder}"}
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        expected = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        if expected != {name: tensor.shape for name, tensor in loaded.state_dict().items()}:
            return 500, {"error": "size mismatch"}
        old = self.model.state_dict()
        if self.stay_old:  # an untied copy: what is stale belongs to one of its parts alone
            loaded = self._with_stale_parts(loaded, old)
        if self.loads_weights:
            self.model = loaded
        self.is_wrecked = False
        self.num_reloads += 1
        return 200, {"results": [None]}

    def _with_stale_parts(self, loaded: PreTrainedModel, old: dict[str, Any]) -> PreTrainedModel:
        table = loaded.get_input_embeddings().weight
        loaded.lm_head.weight = torch.nn.Parameter(table.detach().clone())
        for name in self.stay_old:
            loaded.get_parameter(name).data.copy_(old[name])
        return loaded

    def _reset(self) -> tuple[int, Any]:
        self.answers_with = self.model
        return 200, {"success": True}

    def _tokenize(self, body: Any) -> tuple[int, Any]:
        assert self.tokenizer is not None
        ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return 200, {"tokens": ids.input_ids, "count": len(ids.input_ids)}

    @torch.no_grad()
    def _complete(self, body: Any) -> tuple[int, Any]:
        if self.is_wrecked:
            self.is_dead = True
            return 500, {"error": {"message": "EngineCore encountered an issue"}}
        refusal = self._refusal(body)
        if refusal:
            return 400, {"error": {"message": refusal}}
        if body["model"] != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if (body.get("prompt_logprobs") or 0) > self.max_logprobs:
            return 400, {"error": {"message": "Requested prompt logprobs exceed --max-logprobs"}}
        ids, written, logprobs, reason = list(body["prompt"]), [], [], "length"
        generator = torch.Generator().manual_seed(body.get("seed", 0) % 2**63)
        room = self.max_model_len - len(body["prompt"])
        for _ in range(min(body["max_tokens"], room)):
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

    def _refusal(self, body: Any) -> str:
        if len(body["prompt"]) >= self.max_model_len:
            return f"This model's maximum context length is {self.max_model_len} tokens"
        if body["max_tokens"] > self.max_model_len:
            return f"max_tokens cannot be greater than max_model_len={self.max_model_len}"
        if body.get("temperature", 1.0) > 2 or body.get("seed", 0) > 2**63 - 1:
            return "temperature or seed out of range"
        table = self.answers_with.config.vocab_size if hasattr(self.answers_with, "config") else 0
        if table and max(body["prompt"]) >= table:
            return f"Token id {max(body['prompt'])} is out of vocabulary"
        return ""

    def _draw(self, raw, body, generator) -> tuple[int, float]:
        logits = raw.clone()
        for token, bias in (body.get("logit_bias") or {}).items():
            logits[int(token)] += bias
        if body["temperature"] == 0:
            token = int(logits.argmax())
            return token, float(logits.log_softmax(-1)[token])
        logits = logits / max(body["temperature"], 0.01)
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
                    str(i): {
                        "logprob": max(float(row[i]), -9999.0),
                        "rank": int((row > row[i]).sum()) + 1,
                        "decoded_token": f"t{i}",
                    }
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
            if fault == "drop" or engine.is_dead:
                self.connection.close()
                return
            if fault == "slow":
                time.sleep(engine.slow_seconds)
            status, answer = engine.handle(self.path, body)
            if fault.isdigit():
                status, answer = int(fault), {"error": {"message": "EngineDeadError"}}
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
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
    """Serve an engine on a free port of this machine within the block; yield the engine."""
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
