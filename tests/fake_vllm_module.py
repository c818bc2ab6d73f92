"""A module called ``vllm`` with what the colocated engine uses of it, on a tiny model.

It keeps the real one's habits: weights and cache are gone after sleep level 2, a sleeping engine
answers nothing, and prompts are still answered from old weights until the prefix cache is reset.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

from fake_vllm_server import FakeVLLM
from transformers import AutoModelForCausalLM

LLM_ARGUMENTS = {
    *("model", "skip_tokenizer_init", "dtype", "gpu_memory_utilization", "enable_sleep_mode"),
    *("enforce_eager", "logprobs_mode", "generation_config", "tensor_parallel_size"),
    *("max_model_len", "max_num_seqs"),
}


@dataclass
class SamplingParams:
    """The used fields of vLLM's class; any other one is a TypeError, as in vLLM."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] = field(default_factory=dict)


class LLM:
    made: list[LLM] = []

    def __init__(self, **arguments: Any) -> None:
        unknown = set(arguments) - LLM_ARGUMENTS
        if unknown:
            raise TypeError(f"unexpected keyword arguments {unknown}")
        self.arguments = arguments
        self.fake = FakeVLLM(AutoModelForCausalLM.from_pretrained(arguments["model"]))
        self.fake.logprobs_mode = arguments["logprobs_mode"]
        self.awake = {"weights", "kv_cache"}
        self.calls: list[str] = []
        LLM.made.append(self)

    def sleep(self, level: int = 1) -> None:
        assert self.arguments["enable_sleep_mode"]
        assert level == 2
        self.calls.append("sleep")
        self.awake = set()
        self.fake.model = self.fake.answers_with = None

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(f"wake_up {tags}")
        self.awake |= set(tags or ("weights", "kv_cache"))

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> list[None]:
        assert "weights" in self.awake
        self.calls.append(method)
        loaded = AutoModelForCausalLM.from_pretrained(kwargs["weights_path"]).eval()
        self.fake.model = loaded
        if self.fake.answers_with is None:  # nothing of the cache was kept
            self.fake.answers_with = loaded
        return [None]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        self.fake.answers_with = self.fake.model
        return True

    def generate(self, prompts: list[Any], params: list[SamplingParams], use_tqdm: bool) -> list:
        assert self.awake == {"weights", "kv_cache"}
        return [
            self._answer(p["prompt_token_ids"], s) for p, s in zip(prompts, params, strict=True)
        ]

    def _answer(self, prompt: list[int], params: SamplingParams) -> Any:
        body = {k: v for k, v in vars(params).items() if v is not None}
        request = {**body, "prompt": prompt, "model": "student", "return_token_ids": True}
        status, answer = self.fake.handle("/v1/completions", request)
        assert status == 200, answer
        choice = answer["choices"][0]
        logprobs = choice["logprobs"]
        rows = None
        if logprobs:
            rows = [
                {token: SimpleNamespace(logprob=value)}
                for token, value in zip(
                    choice["token_ids"], logprobs["token_logprobs"], strict=True
                )
            ]
        of_prompt = choice["prompt_logprobs"]
        response = SimpleNamespace(
            token_ids=choice["token_ids"], logprobs=rows, finish_reason=choice["finish_reason"]
        )
        return SimpleNamespace(
            prompt_token_ids=prompt,
            outputs=[response],
            prompt_logprobs=of_prompt
            and [
                row and {int(i): SimpleNamespace(**entry) for i, entry in row.items()}
                for row in of_prompt
            ],
        )


def make_modules(device: str = "cuda") -> dict[str, ModuleType]:
    """Return the modules for ``sys.modules``; like vLLM, the fake sleeps on GPUs only."""
    module, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    platforms.current_platform = SimpleNamespace(
        device_type=device,
        is_cpu=lambda: device == "cpu",
        is_sleep_mode_available=lambda: device == "cuda",
    )
    return {"vllm": module, "vllm.platforms": platforms}
