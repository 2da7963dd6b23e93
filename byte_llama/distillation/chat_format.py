"""How a chat is written: the pieces around its messages, for teacher and student alike."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatFormat:
    """The pieces of a chat; each message is written `start_header`, role, `end_header`, content, `eot`.

    Teacher and student may use different formats: pieces of one name are aligned with each other. Contents are kept as
    they are, and no system message is added, unlike in many chat templates.

    Attributes:
        start_header, end_header, eot: text of these pieces.
        roles: name that the format gives to each role.
    """

    start_header: str
    end_header: str
    eot: str
    roles: Mapping[str, str] = field(
        default_factory=lambda: {"system": "system", "user": "user", "assistant": "assistant"}
    )

    def pieces(self) -> dict[str, str]:
        """Text of each piece, by name; roles under their own."""
        return {"start_header": self.start_header, "end_header": self.end_header, "eot": self.eot, **self.roles}


LLAMA3_FORMAT = ChatFormat("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>")
GEMMA_FORMAT = ChatFormat(
    "<start_of_turn>", "\n", "<end_of_turn>\n", {"system": "user", "user": "user", "assistant": "model"}
)
CHATML_FORMAT = ChatFormat("<|im_start|>", "\n", "<|im_end|>\n")


def chat_format_of(tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    """The format whose first piece is a token of `tokenizer`; None if there is none."""
    vocabulary = tokenizer.get_vocab()
    formats = (LLAMA3_FORMAT, GEMMA_FORMAT, CHATML_FORMAT)
    return next((form for form in formats if form.start_header in vocabulary), None)


__all__ = ["CHATML_FORMAT", "GEMMA_FORMAT", "LLAMA3_FORMAT", "ChatFormat", "chat_format_of"]
