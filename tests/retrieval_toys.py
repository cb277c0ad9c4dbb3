"""What the tests of retrieval share: an embedder that takes no model, and a folder of documents."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import torch

from llmfast.inference.pooling import Pooling
from llmfast.tokenizers import WordTokenizer

TEXTS = {
    "router.md": "# Router\n\nA box with lights.\n\n## Reset\n\nHold the button on the back for ten seconds.\n",
    "garden.txt": "Roses want sun.\n\nTomatoes want much water, and a stick to climb.\n",
    "trains.html": "<html><head><title>x</title><style>p {}</style></head><body><nav>Home</nav><h1>Trains</h1>"
    "<p>The night train to Vienna\n leaves at nine.</p><script>alert(1)</script><ul><li>Bicycles travel free.</li>"
    "</ul></body></html>",
}


class ToyEmbedder:
    """A vector of hashed words: texts that share words are near to one another. It counts what it embeds."""

    name, width, max_tokens, pooling = "toy", 64, 256, Pooling()

    def __init__(self) -> None:
        self.tokenizer = WordTokenizer.train(["a"], 10)
        self.embedded: list[str] = []

    def embed(self, texts, progress=None):
        if isinstance(texts, str):
            return self._vector(texts)
        self.embedded += texts
        return torch.stack([self._vector(text) for text in texts]) if texts else torch.empty(0, self.width)

    def _vector(self, text: str) -> torch.Tensor:
        vector = torch.zeros(self.width)
        for word in text.lower().replace(".", " ").replace(",", " ").split():
            vector[int(hashlib.md5(word.encode()).hexdigest(), 16) % self.width] += 1
        return torch.nn.functional.normalize(vector + 1e-6, dim=0)


def pdf(*pages: str) -> bytes:
    """A PDF with a line of text on each page; a page of "" is a picture."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    kids = []
    for text in pages:
        drawn = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET" if text else "0 0 50 50 re f"
        kids.append(len(objects) + 1)
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 200] /Contents {len(objects) + 2} 0 R /Resources "
            "<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>"
        )
        objects.append(f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream")
    objects[1] = f"<< /Type /Pages /Count {len(kids)} /Kids [{' '.join(f'{kid} 0 R' for kid in kids)}] >>"
    out, places = io.BytesIO(), []
    out.write(b"%PDF-1.4\n")
    for number, content in enumerate(objects, start=1):
        places.append(out.tell())
        out.write(f"{number} 0 obj\n{content}\nendobj\n".encode())
    start = out.tell()
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode())
    out.write("".join(f"{place:010d} 00000 n \n" for place in places).encode())
    out.write(f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n".encode())
    return out.getvalue()


def manuals(folder: Path) -> Path:
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    (folder / "oven.pdf").write_bytes(pdf("Bake bread at 220 degrees.", "Clean the oven when it is cold."))
    return folder
