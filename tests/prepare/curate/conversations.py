"""Conversations for the tests: samples of their own, questions of every sub-domain, and answers with planted faults."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image as Pil

from tests.prepare.curate.builders import a_photo, prose
from trainer.data.sample import Image, Media, Message, Sample, Text, Video

Document = tuple[Sample, list[bytes]]


def a_chat(identity: str, *turns: str, pictures: Sequence[bytes] = (), video: bool = False, **more: Any) -> Document:
    """Questions and answers in turn; pictures (or a video that is never opened) stand before the first question."""
    media, parts = [], []
    for data in [b"a video"] if video else pictures:
        width, height = (64, 64) if video else Pil.open(io.BytesIO(data)).size
        kind, suffix = ("video", "mp4") if video else ("image", "png")
        media.append(
            Media(
                digest=hashlib.sha256(data).hexdigest(), kind=kind, suffix=suffix, size_bytes=len(data),
                width=width, height=height, num_frames=8 if video else 1, duration_s=2.0 if video else 0.0,
            )
        )  # fmt: skip
        parts.append((Video if video else Image)(media=len(media) - 1))
    messages = []
    for number, text in enumerate(turns):
        role, own = ("assistant", ()) if number % 2 else ("user", parts if number == 0 else ())
        messages.append(Message(role=role, parts=(*own, Text(text=text))))
    sample = Sample(
        id=identity, source="chat", kind="instruction", messages=tuple(messages), media=tuple(media), **more
    )
    return sample, [b"a video"] if video else list(pictures)


PHOTO = a_photo(3, 80, 60)

# (sub-domain, what is asked, medium). Written without looking at the word lists again; two of each.
ASKED = (
    ("Code_Debugging", "My loop never ends, can you find the bug?\n```python\nwhile i < 5:\n    print(i)\n```", ""),
    ("Code_Debugging", "I get TypeError: unsupported operand. Why does this line raise an exception?", ""),
    ("Code_Generation", "Write a function that reverses a linked list in C.", ""),
    ("Code_Generation", "Turn this mock-up into HTML code, please.", "image"),
    ("Code_Translation", "Convert this function to Rust:\n```python\ndef f(x):\n    return x * 2\n```", ""),
    ("Code_Translation", "Please port the following Java class into Python.\n```java\npublic class A {}\n```", ""),
    ("Code_Understanding", "What does this code do?\n```c\nint f(int n) { return n ? n * f(n - 1) : 1; }\n```", ""),
    ("Code_Understanding", "What is the time complexity of bubble sort?", ""),
    ("Task_Planning", "I want to launch a newsletter. Give me a step by step plan with milestones.", ""),
    ("Task_Planning", "Help me organise my move to another city: what are the steps?", ""),
    ("Travel_and_Schedule", "Make an itinerary for three days in Lisbon.", ""),
    ("Travel_and_Schedule", "Build me a weekly study schedule around a full-time job.", ""),
    ("Interface_Operation", "Where do I tap to turn on dark mode in this screenshot?", "image"),
    ("Interface_Operation", "Open the app and click the button that sends the form.", "image"),
    ("Arithmetic_and_Algebra", "Solve 3x + 7 = 22 for x.", ""),
    ("Arithmetic_and_Algebra", "What is the derivative of x^3 sin x?", ""),
    ("Geometry", "In the figure AB is the diameter and the angle at C is 30 degrees. Find the radius.", "image"),
    ("Geometry", "What is the area of a rhombus with diagonals 6 and 8?", ""),
    ("Statistics_and_Probability", "Two dice are rolled. What is the probability that the sum is 7?", ""),
    ("Statistics_and_Probability", "Explain variance and standard deviation with an example.", ""),
    ("Word_Problems", "Anna buys 3 pens that cost 2 euros each. How much money is left over from 20 euros?", ""),
    ("Word_Problems", "A train drives 80 km/h. How long will it take for 200 km?", ""),
    ("Natural_Science", "Why do objects fall with the same velocity in a vacuum? What does gravity do?", ""),
    ("Natural_Science", "How does photosynthesis store energy?", ""),
    ("Medicine_and_Health", "What are early symptoms of diabetes?", ""),
    ("Medicine_and_Health", "Does this chest X-ray show an infection?", "image"),
    ("History_and_Society", "Which empire built the Hagia Sophia, and in which century?", ""),
    ("History_and_Society", "What is the capital of Australia?", ""),
    ("Culture_and_Media", "Who painted The Night Watch?", ""),
    ("Culture_and_Media", "Recommend a novel by the author of Dune.", ""),
    ("Text_Recognition", "What does the sign say?", "image"),
    ("Text_Recognition", "Transcribe the handwritten note.", "image"),
    ("Document_Questions", "According to the document, who signed the contract?", "image"),
    ("Document_Questions", "What is the total on this receipt?", "image"),
    ("Table_Questions", "Which row of the table has the highest value in the second column?", "image"),
    ("Table_Questions", "Here is a csv:\nname,age\nA,3\nB,5\nWho is older?", ""),
    ("Chart_Questions", "Which bar is the highest in the chart?", "image"),
    ("Chart_Questions", "What trend does the line graph show after 2010?", "image"),
    ("Information_Extraction", "Extract the sender, date and amount as JSON.", "image"),
    ("Information_Extraction", "List all names and phone numbers in this text: Ann 555-1, Bob 555-2.", ""),
    ("Image_Description", "Describe this picture.", "image"),
    ("Image_Description", "What is happening here? Tell me in detail.", "image"),
    ("Object_Recognition", "What breed is this dog?", "image"),
    ("Object_Recognition", "What colour is the car?", "image"),
    ("Counting", "How many people are in the photo?", "image"),
    ("Counting", "Count the red balloons.", "image"),
    ("Grounding_and_Space", "Give the bounding box of the cat.", "image"),
    ("Grounding_and_Space", "Is the cup to the left of the plate or behind it?", "image"),
    ("Video_Understanding", "At what time does the man open the door?", "video"),
    ("Video_Understanding", "What does the woman do after she sits down?", "video"),
    ("Writing", "Write a short story about a lighthouse keeper.", ""),
    ("Writing", "Rephrase this email so that it sounds friendlier: I need it now.", ""),
    ("Translation", "How do you say good night in Japanese?", ""),
    ("Translation", "Translate into German: The weather is lovely.", ""),
    ("Summarisation", "Summarise the following article in one sentence: The council met on Monday ...", ""),
    ("Summarisation", "What are the key points of this text? Coffee was first grown in ...", ""),
    ("Small_Talk", "Hi! How are you today?", ""),
    ("Small_Talk", "Tell me a joke.", ""),
    ("Advice_and_Opinion", "Should I buy a used car or a new one?", ""),
    ("Advice_and_Opinion", "My friend is always late. What do you think I can do about it?", ""),
)  # fmt: skip


def asked_chats() -> list[tuple[str, Document]]:
    return chats_of(ASKED)


def chats_of(asked: Sequence[tuple[str, str, str]]) -> list[tuple[str, Document]]:
    """(the sub-domain that was meant, a conversation)"""
    media = {"image": {"pictures": [PHOTO]}, "video": {"video": True}, "": {}}
    return [
        (name, a_chat(f"{name}-{number}", question, "Here is what I can say about that.", **media[medium]))
        for number, (name, question, medium) in enumerate(asked)
    ]


# One of each sub-domain, worded as people do who never saw a list of words.
ASKED_FREELY = (
    ("Code_Debugging", "Why does this give me None?\n```python\ndef add(a, b):\n    a + b\n```", ""),
    ("Code_Generation", "I need a bash one-liner that renames all .jpeg files to .jpg.", ""),
    ("Code_Translation", "Same thing in Go, please:\n```python\ndef sq(n):\n    return n * n\n```", ""),
    ("Code_Understanding", "Walk me through this.\n```js\nconst f = a => a.reduce((x, y) => x + y)\n```", ""),
    ("Task_Planning", "We have six weeks until the product launch and nothing is ready. In which order do we go?", ""),
    ("Travel_and_Schedule", "Four days in Rome with two children, not too much walking.", ""),
    ("Interface_Operation", "How can I mute this group here?", "image"),
    ("Arithmetic_and_Algebra", "What is 17 times 23?", ""),
    ("Geometry", "If the side of the square is 4 cm, how long is its diagonal?", ""),
    ("Statistics_and_Probability", "I draw two cards. How likely is a pair of aces?", ""),
    ("Word_Problems", "Tom has twice as many marbles as Lea. Together they have 27. How many does Lea have?", ""),
    ("Natural_Science", "Why is the sky blue?", ""),
    ("Medicine_and_Health", "My knee hurts when I run. What could it be?", ""),
    ("History_and_Society", "Why did the Berlin Wall fall?", ""),
    ("Culture_and_Media", "Which instrument did Miles Davis play?", ""),
    ("Text_Recognition", "Can you read this for me?", "image"),
    ("Document_Questions", "When does the lease end?", "image"),
    ("Table_Questions", "What was the score in the third quarter for the away team?", "image"),
    ("Chart_Questions", "In which year did sales peak?", "image"),
    ("Information_Extraction", "Give me name, address and VAT number as key: value.", "image"),
    ("Image_Description", "Write alt text for this.", "image"),
    ("Object_Recognition", "Is this mushroom edible?", "image"),
    ("Counting", "Are there more cats or dogs here?", "image"),
    ("Grounding_and_Space", "Which of the two boxes is nearer to the door?", "image"),
    ("Video_Understanding", "Why does she start laughing?", "video"),
    ("Writing", "A toast for my brother's wedding, funny but not mean.", ""),
    ("Translation", "What is the Spanish word for butterfly?", ""),
    ("Summarisation", "Too long for me, what does it say in short? The council met on Monday ...", ""),
    ("Small_Talk", "I had a terrible day.", ""),
    ("Advice_and_Opinion", "Is it rude to leave a party early?", ""),
)  # fmt: skip


def freely_asked_chats() -> list[tuple[str, Document]]:
    return chats_of(ASKED_FREELY)


# Answers without a fault, of the forms that look like one.
SOUND = (
    "red",
    "B",
    "42",
    "There are three dogs on the sofa.",
    "```python\ndef add(a, b):\n    return a + b\n```",
    "Use a list:\n\n1. Wash the rice\n2. Boil it\n3. Let it rest",
    "| name | age |\n| --- | --- |\n| Ann | 3 |\n| Bob | 5 |",
    '{"name": "Ann", "amounts": [3, 5], "paid": true}',
    '```json\n{"total": 12.5, "currency": "EUR"}\n```',
    "We have $x = 3$, so\n$$x^2 = 9$$\nand the answer is \\boxed{9}.",
    "\\begin{pmatrix} 1 & 2 \\\\[2pt] 3 & 4 \\end{pmatrix} is the matrix that was asked for, with some space.",
    "\\[ \\int_0^1 x\\,dx = \\tfrac12 \\]",
    "<table><tr><td>1<td>2</tr></table>",
    '<div class="chart"><img data-bbox="1 2 3 4"/><p>Sales grew</p></div>',
    "他在公园里散步,天气很好。孩子们在湖边喂鸭子。",
    "写一个例子:先把水烧开,再放入面条,煮八分钟后捞出",
    "To be, or not to be, that is the question. The line is from Hamlet, act three, and it is often quoted.",
    "See the documentation of the library for all the options that the function takes: https://docs.python.org/3/",
    "Yes! Yes! It works.",
    "The bug is in line 3: `while i < 5` never changes `i`. Add `i += 1` at the end of the loop and it ends. 🎉",
    "Roses are red,\nViolets are blue,\nSugar is sweet,\nAnd so are you.",
    "The sum of the first numbers is one hundred and twenty plus the last term which gives in the end 153",
    "I cannot help with building weapons, but I can tell you about the history of chemistry if that is of use.",
    "A user: in this text a person who signs in. An assistant: a person who helps them with what they need to do.",
)


def sound_answer(seed: int) -> str:
    """One of these, or prose of its own."""
    return SOUND[seed % len(SOUND)] if seed % 3 else prose(seed, 30 + seed % 60)


def _repeated(seed: int) -> str:
    text = prose(seed, 20)
    return (f"{text} {text}", f"{text} " + "the cat and " * 12, f"{text}\n" + "很好" * 30 + "。")[seed % 3]


def _broken_off(seed: int) -> str:
    text = prose(seed, 24).rstrip(".")
    return (text, f"{text}, and", f"{text},", f"{text}.\n```python\ndef f():")[seed % 4]


def _malformed(seed: int) -> str:
    text = prose(seed, 16)
    return (
        f"{text} <|im_end|>",
        f"USER: {text}",
        f"{text} â€œquotedâ€\u009d",
        '{"name": "Ann", "age": }',
        f"| a | b |\n| --- | --- |\n| 1 | 2 | 3 |\n\n{text}",
        f"{text} \\begin{{aligned}} x &= 1.",
        f"$$x = 1. {text}",
        "<div><table><tr><td>1</td></tr></div>",
    )[seed % 8]


DEFECTS = {
    "max_repetition": _repeated,
    "max_incomplete": _broken_off,
    "max_malformed": _malformed,
    "max_harmful_words": lambda seed: (
        f"{prose(seed, 20)} You should go and {('kill yourself', 'cook meth')[seed % 2]}."
    ),
}
