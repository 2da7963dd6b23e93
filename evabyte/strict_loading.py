"""Loading that says what is wrong with a folder: transformers initialises what is missing anew, with a warning."""

from typing import Any

from safetensors import SafetensorError


class StrictLoadingMixin:
    """`from_pretrained` for models whose checkpoints must be complete; mixed in before the model's class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that does not fit is an error that names what does not.

        Raises:
            ValueError: for missing weights and weights of another shape; `ignore_mismatched_sizes=True` accepts them as
                newly initialised, `output_loading_info=True` returns the names of the missing ones instead.
            OSError: when a safetensors file is damaged or cut short.
        """
        accept = kwargs.pop("ignore_mismatched_sizes", False)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *args, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"A safetensors file of {pretrained_model_name_or_path} is damaged or cut short ({error}); copy or "
                "download the folder again."
            ) from error
        misfits = [] if wants_info else [f"{name} (missing)" for name in sorted(info["missing_keys"])]
        misfits += [
            f"{name} (shape {tuple(found)}, expected {tuple(expected)})"
            for name, found, expected in sorted(info["mismatched_keys"])
        ]
        if misfits and not accept:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not hold the weights of this {cls.__name__}: "
                f"{', '.join(misfits[:5])}{f' and {len(misfits) - 5} more' if len(misfits) > 5 else ''}. Check that "
                "the folder is complete and config.json its own, or pass `ignore_mismatched_sizes=True` to initialise "
                "these weights newly."
            )
        return (model, info) if wants_info else model
