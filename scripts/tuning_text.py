"""The text that a chat model's exits are tuned on, and text to measure them on that no tuning has seen.

    python scripts/tuning_text.py prompts runs/llm/text  # prompts-train.jsonl, prompts-heldout.jsonl
    ease-run batch runs/llm/int8 runs/llm/text/prompts-train.jsonl runs/llm/text/answers-train.jsonl \\
        --max-tokens 192
    ease-run batch runs/llm/int8 runs/llm/text/prompts-heldout.jsonl runs/llm/text/answers-heldout.jsonl \\
        --max-tokens 128
    python scripts/tuning_text.py texts runs/llm/text --checkpoint runs/llm/checkpoint  # and the files below

`ease-run batch` goes on where it stopped, and `texts` takes the answers that are there. Tuning text:
WikiText-2's train split, GSM8K with its own solutions, and the model's own answers (every second one sampled)
to other GSM8K questions and to tasks about WikiText's train articles. gates.jsonl: an eighth of the same
kinds, for gates, which must see where the exits err on what they have not learned. counted.jsonl, for the
tokens that a reduced head knows: all of WikiText's train split, all of GSM8K but its last questions, and the
answers. Held out: WikiText-2's test split, and answers to Spec-Bench and to the last questions of GSM8K.

WikiText's own form (` @-@ `, spaces before punctuation, `<unk>` for rare words) is not what a model sees in
use, so it is put back into plain text, and sentences with an `<unk>` are left out.
"""

import gzip
import json
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from ease_common.chat import ChatTemplate
from ease_train.data.corpora import load_documents

SEED = 42
HELDOUT_QUESTIONS = 473  # the last ones of GSM8K's train file, which has 7473
ANSWERED_QUESTIONS = 600  # of GSM8K, by the model; those after them come with GSM8K's own solutions
TOPIC_TASKS = (
    "Tell me about {}.",
    "What is {}?",
    "Write a short story in which {} plays a part.",
    "Explain {} to a child of ten.",
    "List five facts about {}.",
    "Write an email to a friend about {}.",
    "Give three reasons why somebody might be interested in {}.",
    "Write a short dialogue between two people who talk about {}.",
    "Write a poem of eight lines about {}.",
    "Suggest an outline for an essay about {}.",
    "What questions would you ask an expert on {}?",
    "How would you plan a weekend around {}?",
)
TEXT_TASKS = (
    "Summarize: {}",
    "Summarize the following text in two sentences.\n\n{}",
    "Rewrite this in simpler words: {}",
    "Read the text and answer: who or what is it about, and what happens?\n\n{}",
    "List the main points of this text.\n\n{}",
    "Ask three questions that this text answers, and answer them.\n\n{}",
    "Continue this text: {}",
)
GLUED = (  # WikiText's tokens -> plain text, in this order
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([,.;:!?%)\]}])"), r"\1"),
    (re.compile(r"([(\[{$£€]) "), r"\1"),
    (re.compile(r" ('(?:s|t|re|ve|ll|d|m)\b)"), r"\1"),
    (re.compile(r"(\w) n't\b"), r"\1n't"),
    (re.compile(r"s '(?= )"), "s'"),
    (re.compile(r" ' (\w)"), r" '\1"),
    (re.compile(r"(\d) – (\d)"), r"\1–\2"),
    (re.compile(r'" ([^"]*?) "'), r'"\1"'),
)
HEADING = re.compile(r"^ ?((?:= )+)(.*?)(?: =)+ ?$")
SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[\"'(A-Z0-9])")


def detokenised(line: str) -> str:
    """One line of WikiText as plain text, without its sentences that hold `<unk>`; a heading as its words."""
    heading = HEADING.match(line)
    if heading:
        return "" if "<unk>" in line else detokenised(heading[2])
    kept = " ".join(
        sentence for sentence in re.split(r"(?<= [.!?]) ", line.strip()) if "<unk>" not in sentence
    )
    for pattern, plain in GLUED:
        kept = pattern.sub(plain, kept)
    return kept.strip()


def plain_article(article: str) -> str:
    """A WikiText article as paragraphs with an empty line between them."""
    return "\n\n".join(text for line in article.split("\n") if (text := detokenised(line)))


def gsm8k(data: Path) -> list[dict[str, str]]:
    """GSM8K's questions with their solutions, without the marks for a calculator."""
    with gzip.open(data / "prompts" / "gsm8k_train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{"question": row["question"], "answer": plain_solution(row["answer"])} for row in rows]


def plain_solution(answer: str) -> str:
    """`She sold 48/2 = <<48/2=24>>24 clips. #### 24` as a person writes it."""
    return re.sub(r"<<.*?>>", "", answer).replace("#### ", "The answer is ") + "."


def article_tasks(articles: list[str]) -> Iterator[str]:
    """Tasks about the articles' titles and paragraphs, without end: each round another task for
    each article.
    """
    for number in range(10**6):
        article = articles[number % len(articles)]
        title, *paragraphs = article.split("\n\n")
        long = [text for text in paragraphs if 300 <= len(text) <= 1200]
        if number % 2 and long:
            yield TEXT_TASKS[(number // 2) % len(TEXT_TASKS)].format(
                long[(number // len(articles)) % len(long)]
            )
        else:
            yield TOPIC_TASKS[(number // 2) % len(TOPIC_TASKS)].format(title)


def request(number: int, content: str) -> dict[str, Any]:
    """A line for `ease-run batch`: every second answer is sampled, the others are greedy."""
    sampled = {"temperature": 0.7, "top_p": 0.95, "seed": number} if number % 2 else {}
    return {"id": number, "messages": [{"role": "user", "content": content}], **sampled}


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that are whole (a batch that still runs may be writing one)."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def chats(folder: Path, kind: str, template: ChatTemplate) -> list[dict[str, Any]]:
    """The answered prompts as documents: `prompt` and `answer`, and both together as `text`."""
    asked = {line["id"]: line["messages"] for line in read_lines(folder / f"prompts-{kind}.jsonl")}
    answers = [line for line in read_lines(folder / f"answers-{kind}.jsonl") if "choices" in line]
    return [chat(template, asked[line["id"]], line["choices"][0]) for line in answers]


def chat(template: ChatTemplate, messages: list[dict[str, str]], choice: dict[str, str]) -> dict[str, Any]:
    """One document; an answer that ended by itself ends with the token that ends a turn."""
    prompt = template.render(messages)
    answer = choice["text"] + ("<|im_end|>\n" if choice["finish_reason"] == "stop" else "")
    return {"source": "answer", "prompt": prompt, "answer": answer, "text": prompt + answer}


@click.group()
def main() -> None:
    """Build the tuning text and the held-out text."""


data_option = click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=os.environ.get("EASE_DATA_DIR", "data"),
    help="Folder with wikitext-2/ and prompts/.",
)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--number",
    default=1500,
    show_default=True,
    help="Prompts to tune on; their order is mixed, so that any part will do.",
)
@data_option
def prompts(folder: Path, number: int, data: Path) -> None:
    """Write what the model is to answer."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = [row["question"] for row in gsm8k(data)]
    tasks = article_tasks([plain_article(article) for article in load_documents("wikitext-2", "train")])
    train = questions[: min(ANSWERED_QUESTIONS, number // 3)]
    train += [next(tasks) for _ in range(number - len(train))]
    random.Random(SEED).shuffle(train)
    spec = read_lines(data / "prompts" / "spec_bench_half.jsonl")
    heldout = [row["turns"][0] for row in spec[::3]] + questions[-HELDOUT_QUESTIONS:][:24]
    random.Random(SEED).shuffle(heldout)
    write_lines(folder / "prompts-train.jsonl", (request(place, text) for place, text in enumerate(train)))
    write_lines(
        folder / "prompts-heldout.jsonl", (request(2 * place, text) for place, text in enumerate(heldout))
    )  # greedy
    click.echo(f"{folder}: {len(train)} prompts to tune on, {len(heldout)} held out")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path, exists=True),
    help="Whose chat template to use.",
)
@click.option(
    "--wikitext-characters", default=500_000, show_default=True, help="Of WikiText-2's train split."
)
@click.option(
    "--solutions", default=400, show_default=True, help="GSM8K questions with GSM8K's own solutions."
)
@data_option
def texts(folder: Path, checkpoint: Path, wikitext_characters: int, solutions: int, data: Path) -> None:
    """Write tuning.jsonl, gates.jsonl, counted.jsonl and heldout.jsonl (also by kind) from the answers that
    are there.
    """
    template = ChatTemplate((checkpoint / "chat_template.jinja").read_text(encoding="utf-8"))
    rows = gsm8k(data)[ANSWERED_QUESTIONS:-HELDOUT_QUESTIONS][:solutions]
    solved = [
        {
            **chat(
                template,
                [{"role": "user", "content": row["question"]}],
                {"text": row["answer"], "finish_reason": "stop"},
            ),
            "source": "gsm8k",
        }
        for row in rows
    ]
    answered = chats(folder, "train", template)
    documents = [*wikitext("train", wikitext_characters), *solved, *answered]
    random.Random(SEED).shuffle(documents)
    heldout = [*wikitext("test", 120_000), *chats(folder, "heldout", template)]
    shares = {
        "tuning.jsonl": [row for number, row in enumerate(documents) if number % 8],
        "gates.jsonl": documents[::8],
    }
    for name, rows_of in shares.items():
        write_lines(folder / name, ({"source": row["source"], "text": row["text"]} for row in rows_of))
    write_lines(folder / "heldout.jsonl", heldout)
    for kind, rows_of in by_kind(heldout, gsm8k(data)[-HELDOUT_QUESTIONS:]).items():
        write_lines(folder / f"heldout-{kind}.jsonl", rows_of)
    counted = [{"text": plain_article(article)} for article in load_documents("wikitext-2", "train")]
    counted += [{"text": f"{row['question']}\n{row['answer']}"} for row in gsm8k(data)[:-HELDOUT_QUESTIONS]]
    write_lines(folder / "counted.jsonl", [*counted, *({"text": row["answer"]} for row in answered)])
    for name, found in (*shares.items(), ("heldout.jsonl", heldout)):
        for source in sorted({row["source"] for row in found}):
            sizes = [len(row["text"]) for row in found if row["source"] == source]
            click.echo(f"{folder / name}: {source}: {len(sizes)} documents, {sum(sizes):,} characters")


def by_kind(
    heldout: list[dict[str, Any]], questions: list[dict[str, str]]
) -> dict[str, list[dict[str, Any]]]:
    """The held-out documents of each kind: an encyclopedia, sums, and everything else that
    Spec-Bench asks.
    """
    asked = [row["question"] for row in questions]
    kinds: dict[str, list[dict[str, Any]]] = {"wikitext": [], "gsm8k": [], "spec-bench": []}
    for row in heldout:
        sums = any(question in row.get("prompt", "") for question in asked)
        kinds["wikitext" if row["source"] == "wikitext-2" else "gsm8k" if sums else "spec-bench"].append(row)
    return kinds


def wikitext(split: str, characters: int) -> list[dict[str, Any]]:
    """Parts of about 2,000 characters from articles all over a split, as plain text, up to so many characters
    together.
    """
    articles = [plain_article(article) for article in load_documents("wikitext-2", split)]
    each = max(2000, characters // len(articles))
    parts = []
    for article in articles:
        end = article.find("\n\n", each)
        parts.append({"source": "wikitext-2", "text": (article if end < 0 else article[:end]) + "\n"})
    random.Random(SEED).shuffle(parts)
    total = 0
    kept = []
    while parts and total < characters:
        kept.append(parts.pop())
        total += len(kept[-1]["text"])
    return kept


if __name__ == "__main__":
    main()
