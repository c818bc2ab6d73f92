"""The RolloutDataModule: from a dataset's name to the loaders of fit, validate, test and predict.

Owns the settings of data and rollouts. ``sources`` reads, ``examples`` tokenizes, ``rollouts``
makes batches. The tokenizer, the end-of-sequence id and the sources of rows come from the module
and the method callbacks of the run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch.trainer.states import TrainerFn

import okd_lightning.data.parsing_settings  # noqa: F401 - for configs that name it
from okd_lightning.checkpoints.contents import check_text_rules
from okd_lightning.data.ahead import rollouts_ahead
from okd_lightning.data.collective_module import CollectiveDataModule, check_counts
from okd_lightning.data.columns import Columns
from okd_lightning.data.distilled_module import DistilledModule, check_teacher_prompts
from okd_lightning.data.end_tokens import adopt_ends
from okd_lightning.data.examples import ExampleSet, OnOverlong
from okd_lightning.data.parts import part_sources, read_part
from okd_lightning.data.progress import progress_display
from okd_lightning.data.row_templates import prompt_templates
from okd_lightning.data.sources import DataArgument
from okd_lightning.data.teacher_prompts import teacher_prompts_from
from okd_lightning.data.token_cache import AUTO
from okd_lightning.data.tool_turns import checked_turns, equip
from okd_lightning.data.whole_steps import announce, check_limit, settle_steps
from okd_lightning.engines import Sampling
from okd_lightning.errors import ConfigError, DataError
from okd_lightning.models.text_ids import RULES_VERSION
from okd_lightning.records.batches import Example
from okd_lightning.records.collation import RowReader
from okd_lightning.records.noise import NoiseDomain, hashed_choice
from okd_lightning.rollouts import LoaderShape, RolloutLoader, StagedPlan, engine_of, plan_for
from okd_lightning.rollouts.evaluation import DatasetResponses, StudentResponses
from okd_lightning.rollouts.generation import Agreement, Generation, StopRequest, one_rank
from okd_lightning.rollouts.scoring import RolloutScorer, TermScorer
from okd_lightning.tools import Tool, Toolbox

_PART_OF_STAGE = {"fit": "val", "validate": "val", "test": "test", "predict": "predict"}


class RolloutDataModule(CollectiveDataModule):
    """Prompts, dataset responses, and on-policy batches that are generated in every epoch.

    A dataset is a file (JSON, JSONL, CSV, TSV, Parquet), a folder written by datasets'
    save_to_disk, a folder of data files, a hub id, or (in Python) a map-style dataset of mappings,
    such as a list. A row has prompt and response, or chat messages.

    Args:
        train: Training data.
        val: Validation data.
        test: Test data; by default the validation data.
        predict: Prompts for predict; by default the test or validation data.
        batch_size: Sequences per micro-batch (a device's forward pass).
        global_batch_size: Sequences per optimizer step over all devices; gradient accumulation is
            derived from it.
        max_prompt_length: Tokens; on_overlong decides about longer prompts.
        max_response_length: Tokens; dataset responses are cut here (a cut response gets no eos) and
            generation stops here.
        on_overlong: Skip and count rows with longer prompts, or stop with an error.
        prompts_per_epoch: Prompts per epoch; by default the whole dataset.
        prompts_per_rollout: Prompts per rollout batch; by default those of one optimizer step,
            which is strictly on-policy.
        samples_per_prompt: Responses generated to each prompt.
        sampling: Sampling of responses in training and predict; the on-policy metrics of
            validation and test always sample from the student itself (temperature 1).
        val_rollouts: Validation prompts with on-policy responses for the on-policy metrics; 0 for
            none.
        prompt_column: Name of the column with prompts; null if the rows are chats, or whole texts
            (the responses).
        response_column: Name of the column with responses.
        messages_column: Name of the column with chats; null if the rows are plain prompts.
        prompt_template: Text with {COLUMN} fields for prompts, or several, of which a row uses the
            first whose columns it fills.
        as_chat: Render each prompt as a user message by the tokenizer's chat template.
        chat_template_kwargs: Arguments of that template, such as enable_thinking: false (Qwen3).
        subset: Configuration of a hub dataset, such as main.
        train_split: Split of a hub dataset for training.
        val_split: Split of a hub dataset for validation.
        test_split: Split of a hub dataset for test.
        seed: Keys order, sources and sampling noise; by default seed_everything's.
        teacher_prompt_column: Name of the column with the teacher's own prompts: text, or messages
            if the rows are chats. Both models score the same response; earlier assistant turns of a
            prompt then carry no loss.
        teacher_prompt_template: The teacher's own prompts as a text with {prompt} and/or
            {reference} (the row's response); in a chat it replaces the last user message's content.
        max_teacher_prompt_length: Tokens; on_overlong decides about longer ones. By default
            max_prompt_length + max_response_length.
        tools_column: Name of the column with the tools that a chat may call (JSON schemas).
        tools: Tools that rollouts may call, such as Calculator; the template lists them in prompts
            whose rows name no tools. In Python, functions too.
        max_turns: Most turns of a response that calls tools (4 by default); max_response_length
            limits all turns and tool results together.
        token_cache: Folder for tokenized data, from 1000 rows on; auto is okd_lightning/tokens in
            the Hugging Face cache (HF_HOME), null keeps nothing.
        system_column: Name of the column with a chat's system prompt, if rows have one besides
            their messages; null reads no such column.
        teacher_column: Name of the column with a row's teacher, one of RoutedTeachers.
        images_column: Name of the column with the images of a row (files relative to the data
            file), one for each ``<image>`` in its text; null reads no such column; docs/images.md.
        rollout_lag: Rollout batches that are generated while earlier ones are trained on, by the
            student of that many rollout batches before; 0 for none. docs/concepts/rollout-lag.md.

    Raises:
        ConfigError: A number out of its range.
        DataError: At the first use: data that is missing, empty, broken or lacks columns.
    """

    def __init__(
        self,
        train: DataArgument | None = None,
        val: DataArgument | None = None,
        test: DataArgument | None = None,
        predict: DataArgument | None = None,
        *,
        batch_size: int = 8,
        global_batch_size: int | None = None,
        max_prompt_length: int = 512,
        max_response_length: int = 256,
        on_overlong: OnOverlong = "skip",
        prompts_per_epoch: int | None = None,
        prompts_per_rollout: int | None = None,
        samples_per_prompt: int = 1,
        sampling: Sampling | None = None,
        val_rollouts: int = 64,
        prompt_column: str | None = "prompt",
        response_column: str = "response",
        messages_column: str | None = "messages",
        prompt_template: str | list[str] | None = None,
        as_chat: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        subset: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        seed: int | None = None,
        teacher_prompt_column: str | None = None,
        teacher_prompt_template: str | None = None,
        max_teacher_prompt_length: int | None = None,
        tools_column: str = "tools",
        tools: list[Tool] | None = None,
        max_turns: int | None = None,
        token_cache: str | None = AUTO,
        system_column: str | None = "system",
        teacher_column: str | None = None,
        images_column: str | None = "images",
        rollout_lag: int = 0,
    ) -> None:
        super().__init__()
        check_counts(1, batch_size=batch_size, global_batch_size=global_batch_size)
        check_counts(1, max_prompt_length=max_prompt_length, max_turns=max_turns)
        check_counts(1, max_response_length=max_response_length)
        check_counts(1, prompts_per_epoch=prompts_per_epoch, samples_per_prompt=samples_per_prompt)
        check_counts(1, prompts_per_rollout=prompts_per_rollout)
        check_counts(0, val_rollouts=val_rollouts, rollout_lag=rollout_lag)
        self.sources = part_sources(train, val, test, predict)
        other_split = test_split if test is not None else val_split
        self.splits = {"train": train_split, "val": val_split, "test": other_split}
        self.splits["predict"] = test_split if predict is not None else other_split
        self.batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self.on_overlong = on_overlong
        self.prompts_per_epoch = prompts_per_epoch
        self.prompts_per_rollout = prompts_per_rollout
        self.samples_per_prompt = samples_per_prompt
        self.rollout_lag = rollout_lag
        self.sampling = sampling or Sampling()
        self.val_rollouts = val_rollouts
        self.toolbox = Toolbox(tools or ())
        self.max_turns = checked_turns(max_turns, self.toolbox)
        self.columns = Columns(
            prompt=prompt_column,
            response=response_column,
            messages=messages_column,
            tools=tools_column,
            declared_tools=self.toolbox.schemas,
            templates=prompt_templates(prompt_template),
            as_chat=as_chat,
            chat_template_kwargs=chat_template_kwargs or {},
            system=system_column,
            images=images_column,
        )
        self.teacher_prompts = teacher_prompts_from(
            teacher_prompt_column,
            teacher_prompt_template,
            max_teacher_prompt_length,
            default_length=max_prompt_length + max_response_length,
        )
        self.subset, self.teacher_column = subset, teacher_column
        self.token_cache = token_cache
        self.seed = seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
        self._examples: dict[str, ExampleSet] = {}
        self.stop = StopRequest(can_come=False)  # Preemption changes it
        self._train_loader: RolloutLoader | None = None
        self._resumed: dict[str, Any] = {"epoch": 0}
        self._text_rules = RULES_VERSION  # of the run's checkpoint

    def setup(self, stage: str) -> None:
        """Derive the accumulation from ``global_batch_size``; set the module's tools.

        Raises:
            ConfigError: It does not fit the batch size, the devices or the accumulation; or the
                Trainer would end an epoch inside an optimizer step, or change the steps' rows.
        """
        equip(self._module.pair, self.toolbox, self.max_turns, self.columns.chat_template_kwargs)
        if stage == "fit":
            settle_steps(
                self._trainer, self.batch_size, self.global_batch_size, self.samples_per_prompt
            )

    def read_ahead(self, stage: str) -> None:
        """Read and tokenize a stage's data, so that broken rows raise before models load.

        The run's responses then end as those of its data do (``adopt_ends``).

        Raises:
            OKDLightningError: An error that the loaders would raise later.
        """
        pair, template = self._module.pair, self.columns.chat_template_kwargs
        pair.check_sampling(self.sampling)
        if stage == "fit" and self.sources["train"] is not None:
            adopt_ends(pair, self._train_examples()[1], template)
        part = _PART_OF_STAGE[stage]
        if self.sources[part] is not None:
            adopt_ends(pair, self.examples(part), template)

    def _train_examples(self) -> tuple[StagedPlan, ExampleSet]:
        module = self._module
        plan = plan_for(module.terms)
        check_teacher_prompts(module, are_given=self.teacher_prompts is not None)
        return plan, self.examples("train", needs_response="dataset" in plan.sources)

    def train_dataloader(self) -> RolloutLoader:
        """Return the loader for the run's methods, stateful, with new rollouts in every epoch."""
        module, trainer = self._module, self._trainer
        plan, examples = self._train_examples()
        check_text_rules(self._text_rules, plan.sources)  # a checkpoint's, restored by now
        shape = LoaderShape(
            batch_size=self.batch_size,
            prompts_per_epoch=self.prompts_per_epoch or len(examples),
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
            rank=trainer.global_rank,
            prompts_per_rollout=self.prompts_per_rollout,
            samples_per_prompt=self.samples_per_prompt,
        )
        if self.samples_per_prompt > 1 and plan.sources == {"dataset"}:
            raise ConfigError(
                f"data.samples_per_prompt {self.samples_per_prompt} has no effect: this run "
                "generates no responses; leave it out, or use an on-policy method"
            )
        announce(plan, shape)
        teacher = module.pair.teacher
        gather = self.gather if trainer.world_size > 1 else one_rank
        self._train_loader = RolloutLoader(
            examples.examples,
            plan,
            shape,
            engine_of(module.terms, module),
            sampling=self.sampling,
            max_new_tokens=self.max_response_length,
            seed=self.seed,
            reduce_sum=self._reduce_sum if trainer.world_size > 1 else None,
            gather=gather,
            progress=progress_display(trainer),
            score=self._scorer(module),
            teacher_rows=teacher.retokenized if teacher.tokenizer is not None else None,
            stop=self.stop,
            ahead=rollouts_ahead(self.rollout_lag, module, plan, gather),
        )
        ahead = self._train_loader.ahead
        module.pair.settle = ahead.settle if ahead.lag else None
        check_limit(trainer, shape, len(self._train_loader))
        self._train_loader.begin(self._resumed)
        return self._train_loader

    def teardown(self, stage: str) -> None:
        """End the engine of rollouts ahead of training."""
        if self._train_loader is not None:
            self._train_loader.ahead.close()

    def on_exception(self, exception: BaseException) -> None:
        """End the engine of rollouts ahead of training."""
        self.teardown("fit")

    def _scorer(self, module: DistilledModule) -> RolloutScorer | None:
        """Return the scorer of the run's rewards, if it has any."""
        terms = [term for term in module.terms if term.scorer is not None]
        if not terms:
            return None
        rank = self._trainer.global_rank
        return TermScorer(terms, module.decode, self.samples_per_prompt, self.gather, rank)

    def val_dataloader(self) -> list[DatasetResponses | StudentResponses]:
        """Return loaders of dataset responses and of on-policy responses to fixed prompts."""
        return self._evaluation_loaders("val")

    def test_dataloader(self) -> list[DatasetResponses | StudentResponses]:
        """Return the same loaders for the test data."""
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> StudentResponses:
        """Return the loader of the student's responses to all prompts.

        Raises:
            DataError: There are no prompts.
        """
        if self.sources["predict"] is None:
            raise DataError("nothing to predict: give --data.predict a file of prompts")
        return self._own_responses(self.examples("predict").examples, self.sampling)

    def state_dict(self) -> dict[str, Any]:
        """Return the next epoch, the mean length of rollouts, and the version of the text rules."""
        loader = self._train_loader
        position = self._resumed if loader is None else loader.position()
        return {**position, "text_rules": RULES_VERSION}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start from the stored epoch, whether the loader already exists or not."""
        self._resumed = dict(state_dict)
        self._text_rules = state_dict.get("text_rules", 1)
        if self._train_loader is not None:
            self._train_loader.begin(self._resumed)

    def examples(self, part: str, needs_response: bool = False) -> ExampleSet:
        """Return the tokenized rows of train, val, test or predict; read once.

        Raises:
            DataError: The part is not set, or cannot be read.
        """
        source = self.sources[part]
        if source is None:
            raise DataError(f"no data: give --data.{part} a JSONL file, a folder or a hub id")
        key = f"{part}:{needs_response}"
        if key not in self._examples:
            prompted = part != "predict"
            self._examples[key] = read_part(
                part,
                source,
                self._module.pair,
                split=self.splits[part],
                subset=self.subset,
                token_cache=self.token_cache,
                columns=self.columns,
                max_prompt_length=self.max_prompt_length,
                max_response_length=self.max_response_length,
                on_overlong=self.on_overlong,
                needs_response=needs_response,
                teacher_prompts=self.teacher_prompts if prompted else None,
                teacher_tokenizer=self._module.pair.teacher.tokenizer if prompted else None,
                teacher_column=self.teacher_column,
            )
        return self._examples[key]

    def _evaluation_loaders(self, part: str) -> list[DatasetResponses | StudentResponses]:
        trainer = self._trainer
        if self.sources[part] is None and trainer.state.fn == TrainerFn.FITTING:
            return []
        examples, rows = self.examples(part).examples, self._module.pair.teacher.retokenized
        loaders: list[DatasetResponses | StudentResponses] = []
        given = [example for example in examples if example.response_ids]
        if given:
            place = trainer.global_rank, trainer.world_size
            loaders.append(DatasetResponses(given, self.batch_size, *place, rows))
        if self.val_rollouts:
            chosen = hashed_choice(
                len(examples), self.val_rollouts, NoiseDomain.VALIDATION_PROMPTS, self.seed
            )
            loaders.append(self._own_responses([examples[i] for i in chosen], Sampling(), rows))
        return loaders

    def _own_responses(
        self, examples: Sequence[Example], sampling: Sampling, rows: RowReader = list
    ) -> StudentResponses:
        trainer = self._trainer
        settings = sampling, self.max_response_length, self.seed
        run = Generation(self._module, *settings, self.agreement(), progress_display(trainer))
        place = trainer.global_rank, trainer.world_size
        return StudentResponses(examples, self.batch_size, run, *place, rows)

    def agreement(self) -> Agreement:
        """Return the agreement by which this run's ranks stop together during generation."""
        return Agreement(self.gather, self.stop)

    @property
    def _module(self) -> DistilledModule:
        return cast(DistilledModule, self._trainer.lightning_module)
