"""Words in Chinese, Japanese and Arabic that are right: sentences written by hand, and facts about countries in the
names of CLDR (Babel carries it; Unicode License v3): currencies, languages, dates, lists."""

from __future__ import annotations

import datetime
import random
import unicodedata
from functools import cache
from typing import Any

from babel import Locale, dates, languages, lists, numbers

from pipelines.prepare.corpus.sources import Split, draw_split

TEXTS: dict[str, tuple[str, ...]] = {
    "zh": (
        "春天来了，花园里的花都开了。",
        "图书馆每天上午九点开门，晚上八点关门。",
        "请把书放在桌子上，然后关上门。",
        "火车从北京到上海大约需要五个小时。",
        "这篇文章介绍了水在自然界中的循环。",
        "孩子们在河边放风筝，老人们在树下下棋。",
        "实验的结果写在下面的表格里。",
        "我们明天早上七点在车站见面。",
    ),
    "ja": (
        "春になると、庭の花がいっせいに咲きます。",
        "図書館は午前九時に開き、午後八時に閉まります。",
        "本を机の上に置いて、ドアを閉めてください。",
        "東京から大阪まで、電車で約二時間半かかります。",
        "この文章は、自然の中の水の循環を説明します。",
        "子どもたちは川のそばで凧をあげています。",
        "実験の結果は下の表に書いてあります。",
        "明日の朝七時に駅で会いましょう。",
    ),
    "ar": (
        "جاء الربيع وتفتحت الأزهار في الحديقة.",
        "تفتح المكتبة أبوابها في الساعة التاسعة صباحا.",
        "ضع الكتاب على الطاولة ثم أغلق الباب.",
        "يسافر القطار من القاهرة إلى الإسكندرية كل ساعة.",
        "تشرح هذه المقالة دورة الماء في الطبيعة.",
        "يلعب الأطفال بالقرب من النهر.",
        "نتائج التجربة مكتوبة في الجدول التالي.",
        "سنلتقي غدا في المحطة الساعة السابعة صباحا.",
    ),
}
TITLES = {
    "zh": ("国家和货币", "日期", "阅读练习", "语言"),
    "ja": ("国と通貨", "日付", "読み物", "言語"),
    "ar": ("البلدان والعملات", "التواريخ", "نص للقراءة", "اللغات"),
}
"""Of: currencies, dates, sentences, languages."""
HEADS = {"zh": ("国家", "货币"), "ja": ("国", "通貨"), "ar": ("البلد", "العملة")}
SAYS = {"zh": "{}使用的语言有：{}。", "ja": "{}で使われる言語：{}。", "ar": "من اللغات المستخدمة في {}: {}."}
"""Among the languages used in a country are these."""
TERRITORIES = (
    *("AE", "AR", "AT", "AU", "BE", "BR", "CA", "CH", "CL", "CN", "DE", "DK", "DZ", "EG", "ES", "FI", "FR", "GB"),
    *("GR", "ID", "IE", "IN", "IT", "JO", "JP", "KE", "KR", "MA", "MX", "MY", "NL", "NO", "NZ", "PE", "PH", "PL"),
    *("PT", "QA", "SA", "SE", "SG", "TH", "TN", "TR", "UA", "US", "VN", "ZA"),
)


def plain(text: str) -> str:
    """Without the marks that only steer the direction of writing: no font draws them, the page sets its own."""
    return "".join(char for char in text if unicodedata.category(char) != "Cf").replace("\u00a0", " ")


@cache
def _locale(language: str) -> Any:
    return Locale.parse({"zh": "zh_Hans_CN", "ja": "ja_JP", "ar": "ar_EG"}[language])


@cache
def territories(seed: int, split: Split) -> tuple[str, ...]:
    """Countries of one split: names in the held-out pages stand in no page of training."""
    split_of = draw_split(TERRITORIES, 0.2, seed)
    return tuple(code for code in TERRITORIES if split_of[code] == split)


def name_of(language: str, territory: str) -> str:
    return plain(_locale(language).territories[territory])


def currency_of(language: str, territory: str) -> str:
    codes = numbers.get_territory_currencies(territory, start_date=datetime.date(2025, 1, 1))
    return plain(_locale(language).currencies[codes[0]])


def languages_of(language: str, territory: str) -> str:
    """The official languages of a whole country, by law or use, as a list in words."""
    names = [_locale(language).languages[code] for code in languages.get_official_languages(territory, de_facto=True)]
    return plain(lists.format_list(names, locale=_locale(language)))


def date_of(language: str, rng: random.Random) -> str:
    day = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(36_000))
    return plain(dates.format_date(day, "full", locale=_locale(language)))
