"""The reference: transformers' Whisper and language models around a projector that is written as plainly as can be."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestiary.testing import Sample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Together", "Ultravox"]

#: The decoder of a Whisper, which is no part of an Ultravox.
UNHEARD: Mapping[str, Any] = {
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "vocab_size": 8,
    **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "decoder_start")},
}


@dataclass(frozen=True)
class Ultravox:
    """The reference. `parted`: the language model and the tower are saved as folders of their own, beside the first."""

    parted: bool = False

    def build(self, config: Mapping[str, Any], seed: int) -> "Together":
        """With random weights."""
        return Together(config, seed, parted=self.parted)


class Together:
    """Whisper, projector and language model; only the middle is ours, written as plainly as can be."""

    def __init__(self, config: Mapping[str, Any], seed: int, *, parted: bool) -> None:
        import torch
        import transformers
        from torch import nn

        from bestiary.testing.recipe import randomise

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self.config, self._parted, text = dict(config), parted, dict(config["text_config"])
        text_class = getattr(transformers, text["architectures"][0])
        heard = transformers.WhisperConfig(**config["audio_config"], **UNHEARD)
        self.whisper = transformers.WhisperForConditionalGeneration(heard)
        self.text = text_class(text_class.config_class(**text))
        width, inner = text["hidden_size"], config["hidden_size"]
        stacked, last = config["audio_config"]["d_model"] * config["stack_factor"], "ln_post"
        sizes: dict[str, tuple[int, ...]] = {"ln_pre": (stacked,), "linear_1": (inner, stacked)}
        sizes |= {"linear_2": (width, inner // 2), last: (width,)}
        if config.get("projector_ln_mid"):
            del sizes[last]
            sizes["ln_mid"] = (inner // 2,)
        self.projector = nn.ParameterDict({name: nn.Parameter(torch.ones(size)) for name, size in sizes.items()})
        self._known: dict[bytes, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for part in (self.whisper, self.text, self.projector):
            randomise(part.eval(), generator)

    def save(self, folder: Path) -> None:
        """In one folder, or in three, of which the first names the others."""
        from safetensors.torch import save_file

        found = {f"multi_modal_projector.{name}.weight": tensor.data for name, tensor in self.projector.items()}
        config = dict(self.config)
        if self._parted:
            for part, key in ((self.text, "text"), (self.whisper, "audio")):
                part.save_pretrained(folder / key)
                config |= {f"{key}_model_id": str(folder / key)}
                del config[f"{key}_config"]
        else:
            tower = self.whisper.model.encoder.state_dict()
            found |= {f"audio_tower.{name}": tensor for name, tensor in tower.items()}
            found |= {f"language_model.{name}": tensor for name, tensor in self.text.state_dict().items()}
        # A tied head shares its memory with the table.
        save_file({name: tensor.clone() for name, tensor in found.items()}, folder / "model.safetensors")
        config["architectures"] = ["UltravoxModel"]
        (folder / "config.json").write_text(json.dumps(config))

    def judge(self, sample: Sample, answer: Sequence[int]) -> "Tensor":
        """The recordings' vectors in the place of their placeholders."""
        import torch

        recordings, rows = iter(sample.media.get("audio", ())), list[torch.Tensor]()
        mark = self.config["audio_token_index"]
        with torch.inference_mode():
            for token in sample.token_ids:
                rows.append(self._vectors(next(recordings)[0]) if token == mark else self._embedded([token]))
            x_TD = torch.cat([*rows, self._embedded(answer)])
            logits = self.text(inputs_embeds=x_TD[None]).logits[0, :-1]
        found: torch.Tensor = logits.float().log_softmax(-1)
        return found

    def vectors(self, sample: Sample) -> "Tensor":
        """It pools nothing."""
        raise NotImplementedError

    def _embedded(self, ids: Sequence[int]) -> "Tensor":
        import torch

        found: torch.Tensor = self.text.get_input_embeddings()(torch.tensor(list(ids), dtype=torch.int64))
        return found

    def _spectrogram(self, samples: "NDArray[np.float32]") -> "Tensor":
        """[bins, frames], with the last second's hundredth filled or cut as that version did."""
        import numpy as np
        import torch
        from transformers import WhisperFeatureExtractor

        if "audio_latency_block_size" in self.config:
            samples = np.pad(samples, (0, max(-len(samples) % 160, 320 - len(samples), 0)))
        bins = self.config["audio_config"]["num_mel_bins"]
        extractor = WhisperFeatureExtractor(feature_size=bins)  # type: ignore[no-untyped-call]
        return torch.from_numpy(extractor._np_extract_fbank_features(samples[None], "cpu")[0]).float()

    def _vectors(self, samples: "NDArray[np.float32]") -> "Tensor":
        """Of one recording, which is encoded once."""
        if (key := samples.tobytes()) not in self._known:
            self._known[key] = self._encoded(samples)
        return self._known[key]

    def _encoded(self, samples: "NDArray[np.float32]") -> "Tensor":
        import torch
        from torch.nn.functional import pad, rms_norm, silu

        whole, stack = 2 * self.config["audio_config"]["max_source_positions"], self.config["stack_factor"]
        found, weights, spectrogram = [], self.projector, self._spectrogram(samples)
        for start in range(0, spectrogram.shape[1], whole):
            piece = spectrogram[:, start : start + whole]
            frames = piece.shape[1]
            states = self._heard(pad(piece, (0, whole - frames)) if start else piece, frames)
            x = pad(states, (0, 0, 0, -len(states) % stack)).reshape(-1, stack * states.shape[1])
            x = rms_norm(x, x.shape[-1:], weights["ln_pre"], 1e-6)
            passed, gate = (x @ weights["linear_1"].T).chunk(2, -1)
            x = silu(gate) * passed
            if "ln_mid" in weights:
                x = rms_norm(x, x.shape[-1:], weights["ln_mid"], 1e-6)
            x = x @ weights["linear_2"].T
            if "ln_post" in weights:
                x = rms_norm(x, x.shape[-1:], weights["ln_post"], 1e-6)
            found.append(x[: -(-frames // (2 * stack))])
        return torch.cat(found)

    def _heard(self, piece: "Tensor", frames: int) -> "Tensor":
        """[states, width] of Whisper's own modules, without its demand for a whole window."""
        import torch
        from torch.nn.functional import gelu

        tower = self.whisper.model.encoder
        x = gelu(tower.conv2(gelu(tower.conv1(piece[None])))).transpose(1, 2)
        x = x + tower.embed_positions.weight[: x.shape[1]]
        mask = torch.zeros(1, 1, x.shape[1], x.shape[1])
        mask[..., (frames - 1) // 2 + 1 :] = torch.finfo(torch.float32).min
        for layer in tower.layers:
            x = layer(x, mask)
        found: torch.Tensor = tower.layer_norm(x)[0]
        return found
