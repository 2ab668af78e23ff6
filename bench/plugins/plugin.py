"""A plugin: what compresses the encoder layers at one k, and nothing else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bench import __version__
from bench.backbones.sites import EncoderView
from bench.errors import PluginError, first_fault
from bench.measure.closed_form import Compression, Decompression
from bench.plugins.layers import CompressionPair

if TYPE_CHECKING:
    from bench.results import RunResult

CONFIG_FILE, WEIGHTS_FILE = "plugin_config.json", "plugin.safetensors"


class PluginConfig(BaseModel):
    """What a plugin is made for.

    Attributes
    ----------
    k
        How many neighbouring hidden vectors are merged into one.
    family, d_model, n_layers
        Family, width and encoder depth of the backbone.
    d_ff, activation, vocab_size
        Width and activation of the backbone's FFN, and size of its vocabulary, which tell backbones of one size apart.
    bottleneck
        Width of the decompression adapter.
    mask_padding
        Whether padding is left out of scores, softmax and mean.
    compression, decompression
        How vectors are merged and expanded; see `CompressionPair`.
    attention_k
        How many vectors are merged into one, as ``compression`` says, before keys and values are made of them; ``None``
        where each vector has its own.
    backbone
        Name of the backbone, for people.
    bench_version
        Version of this library that wrote it.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    k: int = Field(ge=2)
    family: str
    d_model: int = Field(ge=1)
    n_layers: int = Field(ge=1)
    d_ff: int | None = None
    activation: str | None = None
    vocab_size: int | None = None
    bottleneck: int = Field(default=64, ge=1)
    mask_padding: bool = True
    compression: Compression = "attention"
    decompression: Decompression = "adapter"
    attention_k: int | None = Field(default=None, ge=2)
    backbone: str = ""
    bench_version: str = __version__


class Plugin(nn.Module):
    """Compression pairs for every encoder layer at one k.

    Parameters
    ----------
    config
        Shape of the plugin and of the backbone that it fits.

    Attributes
    ----------
    pairs
        What merges and expands around the FFN, a layer each.
    attention
        What merges before keys and values, a layer each; ``None`` without ``attention_k``.

    Examples
    --------
    >>> plugin = Plugin.from_pretrained("plugins/sst2-k4")   # doctest: +SKIP
    >>> with plugin.attached(model):                         # doctest: +SKIP
    ...     logits = model(**batch).logits
    """

    def __init__(self, config: PluginConfig) -> None:
        super().__init__()
        self.config = config
        self.pairs = nn.ModuleList(
            CompressionPair(
                config.d_model,
                config.k,
                config.bottleneck,
                config.mask_padding,
                config.compression,
                config.decompression,
            )
            for _ in range(config.n_layers)
        )
        self.attention: nn.ModuleList | None = None
        if (k := config.attention_k) is not None:
            # there are as many queries as before, so that nothing is to be expanded
            self.attention = nn.ModuleList(
                CompressionPair(config.d_model, k, 1, config.mask_padding, config.compression, "copy")
                for _ in range(config.n_layers)
            )

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        k: int,
        *,
        bottleneck: int = 64,
        mask_padding: bool = True,
        compression: Compression = "attention",
        decompression: Decompression = "adapter",
        attention_k: int | None = None,
        backbone: str = "",
    ) -> Plugin:
        """Make a new plugin that fits ``model``, initialised as the released code does."""
        view = EncoderView(model)
        return cls(
            PluginConfig(
                k=k,
                family=view.family,
                d_model=view.d_model,
                n_layers=len(view.layers),
                d_ff=view.spec.d_ff,
                activation=view.spec.activation,
                vocab_size=view.spec.vocab_size,
                bottleneck=bottleneck,
                mask_padding=mask_padding,
                compression=compression,
                decompression=decompression,
                attention_k=attention_k,
                backbone=backbone,
            )
        )

    def check_fits(self, view: EncoderView) -> None:
        """Raise ``PluginError`` unless the plugin was made for a backbone of this shape, and can run where it is."""
        spec, config = view.spec, self.config
        pairs = {
            "family": (config.family, view.family),
            "width": (config.d_model, view.d_model),
            "encoder layers": (config.n_layers, len(view.layers)),
            "FFN width": (config.d_ff, spec.d_ff),
            "activation": (config.activation, spec.activation),
            "vocabulary": (config.vocab_size, spec.vocab_size),
        }
        wrong = [f"{name} {made} and not {has}" for name, (made, has) in pairs.items() if made not in (None, has)]
        if wrong:
            raise PluginError(
                f"the plugin does not fit this model: it was made for {config.backbone or 'a backbone'} with "
                f"{', '.join(wrong)}"
            )
        own, theirs = next(self.parameters(), None), next(p for p in view.masked.parameters() if p.is_floating_point())
        if own is not None and (own.dtype, own.device.type) != (theirs.dtype, theirs.device.type):
            raise PluginError(
                f"the plugin is {own.dtype} on {own.device.type}, the model {theirs.dtype} on {theirs.device.type}; "
                f"bring it there: plugin.to({theirs.dtype}).to('{theirs.device.type}')"
            )

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[Plugin]:
        """Run ``model`` with this plugin inside a ``with`` block; afterwards it is bit-identical to before."""
        from bench.plugins.bank import PluginBank

        with PluginBank([self]).attached(model, self.config.k):
            yield self

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``plugin_config.json`` and ``plugin.safetensors`` into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.detach().cpu().contiguous() for n, t in self.state_dict().items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(self.config.model_dump_json(indent=1) + "\n", "utf-8")

    def push_to_hub(
        self,
        repo: str,
        *,
        result: RunResult | None = None,
        private: bool = True,
        license: str = "apache-2.0",
        token: str | None = None,
    ) -> str:
        """Send the plugin and its page to the Hub, in one commit, and return the address of the page.

        Parameters
        ----------
        repo
            ``USER/NAME``; made if there is none.
        result
            The run that made it, which goes beside it, and into its page.
        private
            Whether a repository that is made now is seen by its owner alone; one that is there stays as it is.
        license
            As the Hub names it.
        token
            By default ``HF_TOKEN``, or that of ``hf auth login``.

        Raises
        ------
        HubError
            If there is no token or no right, or the Hub cannot be reached.
        """
        from bench.hub.share import push_plugin

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_plugin(Path(folder), repo, result=result, private=private, license=license, token=token).url

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, revision: str | None = None, token: str | None = None) -> Plugin:
        """Read a plugin that ``save_pretrained`` wrote, here or on the Hub.

        Parameters
        ----------
        folder
            A folder, or ``USER/NAME`` on the Hub where there is no such folder.
        revision
            Branch, tag or commit on the Hub.
        token
            As for `push_to_hub`; a public plugin needs none.

        Raises
        ------
        PluginError
            If a file is missing, torn, or does not belong to the config.
        HubError
            If the Hub has no such repository or revision, or cannot be reached.
        """
        name, folder = str(folder), Path(folder)
        if not folder.exists():
            from bench.hub.client import is_repo
            from bench.hub.share import pull_plugin

            if is_repo(name):
                folder = pull_plugin(name, revision, token)
        elif revision is not None:
            raise PluginError(f"{folder} is a folder on this machine, which has no revision '{revision}'")
        if folder.is_file():
            raise PluginError(
                f"{folder} is a file, and a plugin is a folder of {CONFIG_FILE} and {WEIGHTS_FILE}. A pickle is never "
                f"loaded; of one that the authors of Variator released, `bench convert {folder} OUT` makes a plugin."
            )
        try:
            config = PluginConfig.model_validate(json.loads((folder / CONFIG_FILE).read_text("utf-8")))
        except FileNotFoundError:
            raise PluginError(f"{folder} holds no plugin: {CONFIG_FILE} is missing") from None
        except ValidationError as error:
            raise PluginError(f"{folder / CONFIG_FILE} is no plugin's config: {first_fault(error)}") from None
        except (OSError, ValueError) as error:
            raise PluginError(f"{folder / CONFIG_FILE} cannot be read: {error}") from None
        plugin = cls(config)
        try:
            plugin.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except FileNotFoundError:
            raise PluginError(f"{folder} holds no plugin weights: {WEIGHTS_FILE} is missing") from None
        except SafetensorError as error:
            raise PluginError(f"{folder / WEIGHTS_FILE} is torn or no safetensors file: {error}") from None
        except RuntimeError as error:
            raise PluginError(f"{folder / WEIGHTS_FILE} does not belong to its config: {error}") from None
        return plugin

    def num_parameters(self) -> int:
        """Return the number of parameters of the plugin."""
        return sum(p.numel() for p in self.parameters())
