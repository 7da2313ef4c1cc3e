"""Twenty texts to edit, with what they should become: names in code, spelling, tables, logs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """What is asked, the text, and the text as it should become."""

    sort: str
    order: str
    text: str
    edited: str


def renamed(old: str, new: str, text: str) -> Edit:
    """A name in code, which stands there as `old` alone."""
    return Edit("rename", f"Rename {old} to {new} in this code", text, text.replace(old, new))


def corrected(text: str, *words: tuple[str, str]) -> Edit:
    """A text that is right, and some of its words as they are misspelt."""
    wrong = text
    for right, misspelt in words:
        assert right in wrong, right
        wrong = wrong.replace(right, misspelt, 1)
    return Edit("spelling", "Correct the spelling of this text", wrong, text)


def listed(header: str, *rows: tuple[str, ...]) -> Edit:
    """A table, and its rows as a list in which every value is named."""
    names = header.split("|")
    table = "\n".join(["| " + " | ".join(cells) + " |" for cells in (names, *rows)])
    lines = (", ".join(f"{name}: {cell}" for name, cell in zip(names, row, strict=True)) for row in rows)
    return Edit(
        "table", "Write this table as a list, a line a row", table, "".join(f"- {line}\n" for line in lines)
    )


def copied(old: str, new: str, text: str) -> Edit:
    """A log with one word changed."""
    return Edit("log", f"Copy this log with {new} instead of {old}", text, text.replace(old, new))


EDITS = [
    renamed(
        "limit",
        "ceiling",
        "def total(prices, limit):\n    result = 0\n    for price in prices:\n        if price > limit:\n"
        "            result += price - limit\n        else:\n            result += price\n"
        "    print(limit, result)\n    return result\n",
    ),
    renamed(
        "node",
        "vertex",
        "def reach(graph, node, seen):\n    if node in seen:\n        return seen\n    seen.add(node)\n"
        "    for other in graph[node]:\n        reach(graph, other, seen)\n    return seen\n",
    ),
    renamed(
        "buf",
        "line",
        "def read_records(stream):\n    records = []\n    buf = stream.readline()\n    while buf:\n"
        "        if buf.strip():\n            records.append(buf.strip().split(','))\n"
        "        buf = stream.readline()\n    return records\n",
    ),
    renamed(
        "userId",
        "accountId",
        "function greet(userId, names) {\n  const name = names[userId];\n  if (!name) {\n"
        "    throw new Error(`nobody has the number ${userId}`);\n  }\n"
        "  console.log(userId, name);\n  return `Good morning, ${name}`;\n}\n",
    ),
    renamed(
        "Queue",
        "Backlog",
        "class Queue:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
        "        self.items.append(item)\n\n    def pop(self):\n        return self.items.pop(0)\n\n\n"
        "def filled(items):\n    made = Queue()\n    for item in items:\n        made.push(item)\n"
        "    return made\n",
    ),
    corrected(
        "The meeting will be held in the large room on the second floor. Everyone is asked to bring the "
        "figures of the last quarter, and the report that the office published in March. After lunch we "
        "discuss the plan for the summer.",
        ("will be", "wll be"),
        ("is asked", "is askd"),
        ("published", "publishd"),
        ("discuss", "discusss"),
    ),
    corrected(
        "Our garden has three apple trees and an old pear tree. In autumn the children gather the fruit in "
        "baskets, and we press the juice in the barn. What we do not drink at once is kept in the cellar "
        "until the spring.",
        ("three", "tree"),
        ("gather", "gahter"),
        ("juice", "juce"),
        ("cellar", "celler"),
    ),
    corrected(
        "Before you start the machine, check that the cover is closed and the red lamp is off. Fill the tank "
        "up to the mark, never higher. When the work is done, clean the filter with warm water and let it "
        "dry for an hour.",
        ("machine", "machin"),
        ("closed", "closd"),
        ("never", "nevr"),
        ("filter", "fliter"),
    ),
    corrected(
        "She took the first train to the coast and walked along the beach until noon. The wind was strong, "
        "and only two boats were on the water. In the small harbour she bought bread and fish, and read the "
        "letter for the third time.",
        ("train", "trian"),
        ("beach", "baech"),
        ("strong", "stong"),
        ("harbour", "harbuor"),
    ),
    corrected(
        "A battery gives the same voltage until it is nearly empty, and then falls quickly. That is why the "
        "device shows a full sign for weeks and switches itself off within a day. Measure it under load, not "
        "alone, and you will see the end coming.",
        ("voltage", "votlage"),
        ("quickly", "quikly"),
        ("switches", "swiches"),
        ("Measure", "Mesure"),
    ),
    listed(
        "city|river|bridges",
        ("Prague", "Vltava", "18"),
        ("Budapest", "Danube", "9"),
        ("Florence", "Arno", "7"),
        ("Dresden", "Elbe", "8"),
    ),
    listed(
        "part|number|price",
        ("hinge", "A-1040", "2.50"),
        ("bolt M6", "A-2071", "0.30"),
        ("spring", "B-0033", "1.75"),
        ("washer", "B-0119", "0.05"),
    ),
    listed(
        "day|morning|evening",
        ("Monday", "swimming", "choir"),
        ("Tuesday", "free", "chess club"),
        ("Wednesday", "market", "reading"),
        ("Thursday", "swimming", "cinema"),
    ),
    listed(
        "planet|moons|year in days",
        ("Mercury", "0", "88"),
        ("Venus", "0", "225"),
        ("Mars", "2", "687"),
        ("Jupiter", "95", "4333"),
    ),
    listed(
        "name|team|office",
        ("Ada Berg", "payments", "Oslo"),
        ("Juan Prieto", "search", "Madrid"),
        ("Mei Tanaka", "storage", "Osaka"),
        ("Tom Reed", "search", "Leeds"),
    ),
    copied(
        "server",
        "worker",
        "09:12 server started\n09:13 server opened the port 8080\n09:14 request from 10.0.0.4\n"
        "09:15 server wrote 512 bytes\n09:16 request from 10.0.0.7\n09:17 server wrote 812 bytes\n"
        "09:18 server closed the port 8080\n",
    ),
    copied(
        "WARN",
        "ERROR",
        "INFO disk: 3 volumes mounted\nWARN disk: volume b is 91 percent full\nINFO backup: begins\n"
        "WARN backup: file notes.db is locked\nINFO backup: 1204 files in 38 seconds\n"
        "WARN clock: 2 seconds behind\n",
    ),
    copied(
        "/var/old",
        "/srv/data",
        "copy /var/old/a.csv ok 1204 lines\ncopy /var/old/b.csv ok 88 lines\ncopy /var/old/c.csv failed\n"
        "retry /var/old/c.csv ok 310 lines\nremove /var/old/c.tmp ok\n",
    ),
    copied(
        "alice",
        "bob",
        "2024-03-01 login alice from office\n2024-03-01 open report-7 by alice\n"
        "2024-03-01 save report-7 by alice\n2024-03-02 login alice from home\n"
        "2024-03-02 print report-7 by alice\n2024-03-02 logout alice\n",
    ),
    copied(
        "build 41",
        "build 42",
        "build 41: fetch sources, 12 s\nbuild 41: compile core, 95 s\nbuild 41: compile tools, 41 s\n"
        "build 41: run 318 tests, 60 s\nbuild 41: pack, 8 s\nbuild 41: done, 216 s\n",
    ),
]
