"""Reports: what a radiologist would write, as findings; read from and written in English and Chinese.

GuideGen draws an anatomy from a report. A report is free text; what of it decides the anatomy is a list of findings:
an organ or a lesion, its state, its place, its size. `parse_report` reads them, with negation, `write_report` puts
them into words, and `list_reports` lists the reports of a file or folder as cases.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .io import Case, CaseError, seeded, stem

# Number of what `parse_report` makes of texts: raise it when a text is read otherwise, so that caches are filled anew.
READING = 1


@dataclass(frozen=True)
class Finding:
    """One thing that a report says.

    Attributes:
        what: an organ (``ORGANS``), ``"tumour"``, or any other noun of the report, in lower case: an open vocabulary.
        state: ``"present"``, ``"absent"``, ``"enlarged"`` or ``"small"``; a hollow organ that is full is enlarged.
        where: place of a tumour, one of ``SITES``, or any other words.
        size_cm: largest diameter.
    """

    what: str
    state: str = "present"
    where: str = ""
    size_cm: float | None = None


@dataclass(frozen=True)
class Attributes:
    """All that a report says.

    Attributes:
        findings: in the order of the report.
        sex: ``"male"``, ``"female"`` or ``""``, which is unknown.
        age: years, or None.
    """

    findings: tuple[Finding, ...] = ()
    sex: str = ""
    age: int | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Words. Of each name's words, the first English and the first Chinese one is what `write_report` writes.


def _words(text: str) -> tuple[str, ...]:
    """Words of a list with commas, over several lines."""
    return tuple(word for word in re.split(r",\s+|\n\s*", text.strip()) if word)


ORGANS: dict[str, tuple[str, ...]] = {
    "spleen": _words("spleen, splenic, 脾脏, 脾"),
    "kidney_right": _words(
        "right kidney, right renal, r kidney, rt kidney, kidney on the right, 右肾, 右侧肾脏, 右肾脏"
    ),
    "kidney_left": _words("left kidney, left renal, l kidney, lt kidney, kidney on the left, 左肾, 左侧肾脏, 左肾脏"),
    "liver": _words("liver, hepatic, 肝脏, 肝"),
    "stomach": _words("stomach, gastric, 胃, 胃腔, 胃部"),
    "pancreas": _words("pancreas, pancreatic, 胰腺, 胰"),
    "small_bowel": _words("small bowel, small intestine, jejunum, ileum, 小肠, 空肠, 回肠"),
    "duodenum": _words("duodenum, duodenal, 十二指肠"),
    "colon": _words("colon, colonic, large bowel, large intestine, 结肠, 大肠"),
    "urinary_bladder": _words("urinary bladder, bladder, 膀胱"),
    "vertebrae": _words("vertebrae, vertebral bodies, vertebra, spine, 椎体, 脊柱"),
}
# The flexures, and the junction to the rectum, count as the site beside them.
SITES: dict[str, tuple[str, ...]] = {
    "caecum": _words("caecum, cecum, caecal, cecal, ileocaecal, ileocecal, 盲肠, 回盲部, 回盲"),
    "ascending colon": _words("ascending colon, hepatic flexure, 升结肠, 结肠肝曲, 肝曲"),
    "transverse colon": _words("transverse colon, 横结肠"),
    "descending colon": _words("descending colon, splenic flexure, 降结肠, 结肠脾曲, 脾曲"),
    "sigmoid colon": _words("sigmoid colon, sigmoid, rectosigmoid, recto sigmoid, 乙状结肠, 乙状, 直乙交界"),
    "rectum": _words("rectum, rectal, 直肠"),
}
PLACES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("kidney", "renal"): ("kidney",),  # one of the two, and we do not know which
    **{words: (name,) for names in (ORGANS, SITES) for name, words in names.items()},
    _words("""
        both kidneys, kidneys, each kidney, either kidney, two kidneys, bilateral renal, left and right kidney,
        right and left kidney, 双肾, 双侧肾脏, 双侧肾, 两肾, 两侧肾脏, 左右肾, 左右两肾, 左、右肾, 右、左肾, 肾脏, 肾
    """): ("kidney_right", "kidney_left"),
}
LESIONS: dict[str, tuple[str, ...]] = {
    "tumour": _words("""
        mass, tumour, tumor, carcinoma, adenocarcinoma, cancer, malignancy, neoplasm, 肿块, 肿瘤, 癌, 腺癌, 癌肿, 包块,
        新生物, 软组织肿块, 软组织肿块影, 肿块影, 恶性肿瘤
    """),
    # A tumour, too; denied, it is so of the organ in question.
    "lesion": _words("lesion, mass lesion, space occupying lesion, 占位, 占位性病变, 占位影, 病灶, 病变"),
    "cyst": _words("cyst, 囊肿, 囊性病变, 囊肿影"),
    "ascites": _words("ascites, 腹水, 腹腔积液"),
    "gallstones": _words("gallstones, gallstone, cholelithiasis, 胆囊结石, 胆结石"),
    "stone": _words("stone, calculus, calculi, 结石"),
    "hydronephrosis": _words("hydronephrosis, hydronephrotic, 积水"),
    "metastases": _words("metastases, metastasis, 转移, 转移瘤, 转移灶"),
    "wall thickening": _words("wall thickening, 壁增厚, 管壁增厚, 肠壁增厚"),
    "steatosis": _words("steatosis, 脂肪变"),
    "pleural effusion": _words("pleural effusion, 胸腔积液"),
}
# Organs that no label has, and names in which a shorter word would be mistaken.
NOUNS: dict[str, tuple[str, ...]] = {
    "gallbladder": _words("gallbladder, gall bladder, 胆囊"),
    "lymph nodes": _words("lymph nodes, lymph node, 淋巴结"),
    "prostate": _words("prostate, 前列腺"),
    "uterus": _words("uterus, 子宫"),
    "adrenal glands": _words("adrenal glands, adrenal gland, 肾上腺"),
    "bile duct": _words("bile duct, 胆管, 胆总管, 肝内胆管"),
    **{
        word: (word,)
        for word in _words("""
            splenic vein, splenic artery, splenic hilum, hepatic vein, hepatic artery, hepatic hilum, renal vein,
            renal artery, renal pelvis, mass effect, 脾门, 脾静脉, 肝门, 肝静脉, 肾盂, 肾静脉, 肾动脉, 胃肠道, 胃肠
        """)
    },
}
# Whole findings in one word.
FACTS: dict[tuple[str, ...], tuple[Finding, ...]] = {
    _words("splenomegaly, 脾大, 巨脾"): (Finding("spleen", "enlarged"),),
    _words("hepatomegaly, 肝大"): (Finding("liver", "enlarged"),),
    _words("hepatosplenomegaly, 肝脾大, 肝脾肿大"): (Finding("liver", "enlarged"), Finding("spleen", "enlarged")),
    _words("splenectomy, asplenia"): (Finding("spleen", "absent"),),
    _words("right nephrectomy, right sided nephrectomy, solitary left kidney"): (Finding("kidney_right", "absent"),),
    _words("left nephrectomy, left sided nephrectomy, solitary right kidney"): (Finding("kidney_left", "absent"),),
    _words("gastrectomy, total gastrectomy"): (Finding("stomach", "absent"),),
    _words("cystectomy"): (Finding("urinary_bladder", "absent"),),
    _words("fatty liver, 脂肪肝"): (Finding("steatosis", where="liver"),),
}
STATES: dict[str, tuple[str, ...]] = {
    "enlarged": _words("""
        enlarged, enlargement, hypertrophic, hypertrophy, hypertrophied, swollen, bulky, distended, distension,
        distention, overdistended, dilated, dilatation, dilation, full, filled, increased in size, 增大, 肿大, 扩大,
        扩张, 膨隆, 偏大, 充盈, 过度充盈, 明显充盈
    """),
    "small": _words("""
        shrunken, atrophic, atrophy, atrophied, contracted, collapsed, empty, emptied, underfilled, decompressed,
        hypoplastic, decreased in size, reduced in size, poorly distended, underdistended, nondistended,
        incompletely distended, poorly filled, 缩小, 变小, 偏小, 萎缩, 空虚, 排空, 塌陷, 萎陷, 体积小, 充盈欠佳,
        充盈不佳, 充盈差, 未充盈, 不充盈, 欠充盈
    """),
    "absent": _words("""
        absent, absence, removed, resected, excised, resection, removal, missing, agenesis, aplasia, not seen,
        not visualised, not visualized, not identified, not present, not found, not demonstrated, not detected,
        cannot be seen, cannot be identified, could not be identified, 缺如, 缺失, 切除, 切除术后, 切除后, 已切除,
        摘除, 摘除术后, 根治术后, 术后缺如, 未显示, 未见显示, 不存在
    """),
    "normal": _words("""
        normal, unremarkable, within normal limits, preserved, intact, clear, adequately distended, normally distended,
        正常, 如常, 无殊, 无特殊, 充盈良好, 充盈可, 充盈佳, 尚可, 不大, 不小, 大小可
    """),
    "odd": _words("abnormal, abnormality, abnormalities, 异常"),
}
# Before a noun these say little: a small cyst is a cyst, but a small kidney is small.
ADJECTIVES: dict[str, tuple[str, ...]] = {
    "enlarged": _words("large, larger, big, bigger, massive, giant, 巨大"),
    "small": _words("small, smaller, tiny, 小"),
}
# What a sentence is held together by.
GRAMMAR: dict[str, tuple[str, ...]] = {
    "not": _words("""
        no, not, neither, never, none, nil, nothing, free of, lack of, negative for, isn't, aren't, hasn't,
        wasn't, 未见, 未见明显, 未发现, 未探及, 未触及, 未及, 未, 无, 没有, 否认
    """),
    "without": ("without",),
    "and": _words("and, &, /, as well as, 、, 和, 及, 与, 以及, 并"),
    "or": _words("or, nor, 或"),
    "but": _words("but, however, although, though, while, whereas, except, except for, apart from, despite, 但, 而"),
    "is": _words("""
        is, are, was, were, be, been, has been, have been, had been, appears, appear, looks, remains, :, 为, 呈, 是
    """),
    "see": _words("""
        with, has, have, had, shows, show, showing, contains, contain, containing, demonstrates, reveals, evidence of,
        seen, noted, identified, found, detected, present, visible, visualised, visualized, 见, 可见, 示, 显示, 有,
        内见, 内可见, 伴, 伴有, 存在, 发现, 探及, 考虑, 提示
    """),
    "in": _words("in, within, inside, at, of, along, near, from, involving, affecting, arising from, 位于, 于, 在"),
    "other": _words("other, further, additional, 其他, 其它, 其余, 余"),
    "article": _words("a, an"),
    # Nothing that we keep.
    "skip": _words("""
        the, its, it, this, that, these, which, his, her, to, by, for, on, as, up, mild, moderate, marked, severe,
        slight, significant, borderline, very, quite, simple, multiple, several, few, some, any, single, focal,
        discrete, definite, obvious, apparent, suspicious, suspected, possible, probable, new, old, known, stable,
        unchanged, otherwise, overall, now, longer, again, also, still, well, compensatory, circumferential,
        diffuse, soft tissue, upper, lower, mid, middle, pole, proximal, distal, anterior, posterior, medial, lateral,
        left, right, sided, bilateral, lumen, region, area, segment, lobe, cortex, parenchyma, attenuation, density,
        enhancement, contour, contours, shape, position, morphology, texture, measures, measure, measuring, measured,
        size, sized, in size, diameter, in diameter, dimension, dimensions, maximum, maximal, max, largest, approx,
        about, around, circa, anal verge, colorectal, patient, presents, presenting, presented, underwent, referred,
        year, years, old, aged, age, sex, ago, ct, mri, scan, study, image, images, imaging, examination, abdomen,
        abdominal, contrast, report, findings, finding, impression, indication, technique, history, clinical,
        conclusion, status post, post, status, s/p, prior, previous, partial resection, partially resected,
        partial nephrectomy, partial splenectomy, partial gastrectomy, subtotal gastrectomy, partial cystectomy,
        部分切除, 部分切除术后, 大小, 形态, 大小形态, 体积, 密度, 信号, 轮廓, 实质, 管壁, 肠壁, 管腔, 范围, 内, 其内,
        处, 部, 区, 影, 旁, 一, 个, 一个, 一枚, 一处, 枚, 约, 大约, 约为, 直径, 直径约, 最大径, 最大径约, 最大直径,
        长径, 径, 最大, 的, 明显, 明确, 显著, 轻度, 中度, 重度, 稍, 略, 较, 均, 已, 代偿性, 软组织, 软组织密度, 结直肠,
        患者, 病人, 性, 岁, 年龄, 性别, 腹部, 检查, 检查所见, 所见, 影像所见, 诊断, 意见, 印象, 平扫, 增强, 扫描, 术后,
        术后改变, 改变, 复查, 先天性, 先天, 可能, 可疑, 疑似, 多发, 单发, 多个, 数个, 左侧, 右侧, 双侧, 上段, 中段,
        下段, 不均匀, 不均, 不规则, 不清, 欠清, 均匀, 规则, 清晰, 不厚, 壁不厚, 无法
    """),
}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Token(NamedTuple):
    """What the parser knows of a word.

    Attributes:
        kind: ``place``, ``noun`` (any word that has no other kind), ``state``, ``adjective``, ``facts``, ``size``, or
            one of ``GRAMMAR``.
        value: names of a place, the noun, name of the state, the findings, or centimetres.
    """

    kind: str
    value: Any = ""


THERE = Token("is", "there")
LONGEST = 100  # tokens; what has no full stop for so long is cut, as time grows with the square
LETTER, HAN = "a-zß-ÿ", "\u4e00-\u9fff"
SENTENCE = re.compile(r"\.(?!\d)|(?<!\d)\.|[;!?。\n]")
LENGTH = "(?:cm|mm|centimet(?:er|re)s?|millimet(?:er|re)s?|厘米|毫米|公分)"
NUMBER = r"(?<!\d)\d{1,4}(?:[.,]\d{1,6})?"
TIMES = "[x\u00d7*~-]"
# Lengths that are no size: of the scan, of the past, to the anal verge.
NO_SIZE = (
    rf"(?:距|层厚|层距|原|previous(?:ly)?|formerly|slice thickness)[^,;。\d]{{0,12}}{NUMBER}[\s-]*{LENGTH}|"
    rf"{NUMBER}[\s-]*{LENGTH}\s+(?:from|above|below|proximal|distal)\b"
)
SIZE = rf"{NUMBER}(?:[\s-]*{LENGTH}?\s*(?:{TIMES}|to|by)\s*{NUMBER}){{0,2}}[\s-]*{LENGTH}(?![{LETTER}])"
ADVERB = rf"(?<![{LETTER}])[a-z]+(?:al|ve|ri|te|ed|nt|us|ht|ld|im|re|ss|ke)ly(?![{LETTER}])"
OTHER = rf"[{LETTER}][{LETTER}'-]+(?:\s+[{LETTER}][{LETTER}'-]+)*|[{HAN}]+"

WOMAN, MAN = "female|woman|lady|girl|女性|女士|女", "male|man|gentleman|boy|男性|先生|男"
SEX = re.compile(rf"(?<![a-z])(?:(?P<female>{WOMAN})|(?P<male>{MAN}))(?![a-z])")
# What may stand between a noun and its place, as kinds of tokens.
LEADS = re.compile("(and noun )*(in size )?(((is|size) )*(in )?|((is|see|size) )*in )")

EITHER = rf"(?:(?P<female>{WOMAN}|f)|(?P<male>{MAN}|m))(?![a-z])"
YEARS = r"[\s-]*(?:years?|yrs?|y)"
AGE = rf"(?<![\d.])(?P<age>\d{{2,3}}|\d(?={YEARS}|\s*岁|\s*[,.]|$))(?![.]?\d|[\s-]*{LENGTH}|\s*{TIMES}\s*\d)"
AGES = [
    re.compile(rf"{AGE}(?:{YEARS}[\s-]*(?:old|of age|/?o)(?![a-z])|\s*周?岁)(?:\s*[,/]?\s*{EITHER})?"),
    re.compile(rf"(?<![a-z])(?:aged?|年龄)\s*(?:is|为|:)?\s*{AGE}(?:{YEARS}(?![a-z]))?"),
    re.compile(rf"(?<![a-z]){EITHER}(?:\s*patient)?\s*[,/]?\s*{AGE}(?:{YEARS}(?![a-z]))?"),
    re.compile(rf"{AGE}(?:{YEARS}(?![a-z]))?\s*[,/]?\s*{EITHER}"),
]


def _lexicon() -> dict[str, Token]:
    """Every word that the parser knows."""
    tokens = {words: Token("place", names) for words, names in PLACES.items()}
    tokens |= {words: Token("facts", facts) for words, facts in FACTS.items()}
    for kind, names in (("noun", NOUNS | LESIONS), ("state", STATES), ("adjective", ADJECTIVES)):
        tokens |= {words: Token(kind, name) for name, words in names.items()}
    tokens |= {words: Token(kind) for kind, words in GRAMMAR.items()}
    tokens |= {("there", "there is", "there are", "there was"): THERE}
    return {word: token for words, token in tokens.items() for word in words}


def _pattern(word: str) -> str:
    """Regular expression of a word; Chinese has no gaps between words, and no plural."""
    body = re.escape(word).replace(r"\ ", r"[\s-]+")
    plural = "(?:e?s)?" if LEXICON[word].kind in ("noun", "place", "facts") else ""
    return rf"(?<![{LETTER}]){body}{plural}(?![{LETTER}])" if word[0].isascii() and word[0].isalpha() else body


LEXICON = _lexicon()
KNOWN = "|".join(_pattern(word) for word in sorted(LEXICON, key=len, reverse=True))
SCAN = re.compile(rf"(?P<skip>{NO_SIZE})|(?P<size>{SIZE})|(?P<comma>,)|(?P<known>{KNOWN})|{ADVERB}")


def parse_report(text: str) -> Attributes:
    """Read a report in English or Chinese, or a list of keywords.

    It goes by words and their order, sentence by sentence, clause by clause. It reads organs and their states, tumours
    and any other noun with place and size, negations, sex and age. Of contradictions the later wins, once per organ.

    Its limits: a hedge ("possible", "cannot be excluded") reads as a plain statement, and a past finding as a present
    one; degree, number, sides of anything but kidneys, and what is left of an organ in parts are lost; two lesions of
    one kind in one place are one, of the larger size; long descriptions without a known word are passed over, as are
    sentences in other languages. Nothing raises: what is not understood says nothing.

    Example:
        >>> parse_report("Male, 63. No splenomegaly; a mass of 3 x 4.5 cm in the rectum.").findings
        (Finding(what='spleen', state='present', where='', size_cm=None), \
Finding(what='tumour', state='present', where='rectum', size_cm=4.5))
    """
    text = re.sub(r"\r\n?", "\n", unicodedata.normalize("NFKC", text).replace("\u2019", "'"))
    text = re.sub(r"\n(?=[ \t]*[a-z])", " ", text).lower()  # a line that goes on
    text = re.sub(r"\b(?:sex|gender)\s*[:=]?\s*([fm])\b", lambda m: {"f": "female", "m": "male"}[m[1]], text)
    text = text.replace("neither kidney", "not both kidneys")
    text, sex, age = _person(text)
    reader = _Reader()
    for sentence in SENTENCE.split(text):
        tokens = list(_tokens(sentence))
        for i in range(0, len(tokens), LONGEST):
            reader.read(tokens[i : i + LONGEST])
    return Attributes(_merged(reader.said), sex, age)


def _person(text: str) -> tuple[str, str, int | None]:
    """Sex and age, and the text without them."""
    sex, age = "", None
    for pattern in AGES:
        if age is None and (match := pattern.search(text)) and int(match["age"]) <= 130:
            age, groups = int(match["age"]), match.groupdict()
            sex = next((key for key in ("female", "male") if groups.get(key)), sex)
            text = f"{text[: match.start()]},{text[match.end() :]}"
    for match in SEX.finditer(text):
        sex = str(match.lastgroup)
    return SEX.sub(" ", text), sex, age


def _tokens(text: str) -> Iterator[Token]:
    """Words of a sentence; what lies between two that are known is a noun, or too long to be one."""
    start = 0
    for match in [*SCAN.finditer(text), None]:
        for other in re.findall(OTHER, text[start : match.start() if match else None]):
            if _is_noun(other):
                yield Token("noun", " ".join(other.split()))
        if match:
            yield _token(match)
            start = match.end()


def _is_noun(words: str) -> bool:
    if words >= "\u4e00":
        return 2 <= len(words) <= 8
    return len(words) > 2 and len(words.split()) <= 4


def _token(match: re.Match[str]) -> Token:
    if match["size"]:
        numbers = [float(number.replace(",", ".")) for number in re.findall(NUMBER, match["size"])]
        in_mm = any(unit in match["size"] for unit in ("mm", "milli", "毫米"))
        return Token("size", round(max(numbers) / (10 if in_mm else 1), 3))
    if word := match["known"]:
        spaced = re.sub(r"[\s-]+", " ", word)
        return next(LEXICON[w] for w in (spaced, spaced.removesuffix("s"), spaced.removesuffix("es")) if w in LEXICON)
    return Token("," if match["comma"] else "skip")


@dataclass
class Subject:
    """What a clause says about places (organs, sites) or about a noun.

    Attributes:
        names: the places, or the one noun.
        kind: ``place`` or ``noun``.
        start: index of its first token in the clause.
        end: index behind its last.
        states: what is said of it, with whether that is negated.
        where: places of a noun.
        taken: it is the place of a noun.
        size_cm: largest diameter.
    """

    names: tuple[str, ...]
    kind: str
    start: int
    end: int
    states: list[tuple[str, bool]] = field(default_factory=list)
    where: tuple[str, ...] = ()
    taken: bool = False
    size_cm: float | None = None

    @property
    def state(self) -> str:
        """The state that is said outright; a negated one leaves ``present``; or nothing."""
        outright = [state for state, negated in self.states if not negated and state not in ("normal", "odd")]
        plain = [state for state, negated in self.states if negated != (state == "normal")]
        return outright[-1] if outright else "present" if plain else ""


class _Reader:
    """Reads tokens clause by clause.

    Attributes:
        said: findings, with whether they say more than that the thing is there.
        carried: place that the running sentence is about.
        begun: how many findings there were before the sentence.
    """

    def __init__(self) -> None:
        self.said: list[tuple[Finding, bool]] = []
        self.carried: tuple[str, ...] = ()
        self.begun = 0

    def read(self, tokens: list[Token]) -> None:
        """Read a sentence."""
        self.carried, self.begun = (), len(self.said)
        for clause in _clauses([token for token in tokens if token.kind != "skip"]):
            self.read_clause(_with_places(clause))

    def read_clause(self, clause: list[Token]) -> None:
        """Read a clause."""
        kinds = [token.kind for token in clause]
        subjects = _subjects(clause)
        places = [subject for subject in subjects if subject.kind == "place"]
        if places and not set(kinds) - {"place", "in", "and", "size", "is"} and self.place_last(places[0]):
            subjects = places
            places[0].taken = True
        for i, token in enumerate(clause):
            if token.kind in ("state", "adjective"):
                self.give_state(clause, i, subjects)
            elif token.kind == "facts":
                self.said += [(_denial(fact) if _denied(clause, i) else fact, True) for fact in token.value]
        nouns = [subject for subject in subjects if subject.kind == "noun" and _means(subject, clause)]
        for noun in nouns:
            self.give_place(clause, noun, places)
        self.give_sizes(clause, nouns or places)
        for subject in [*places, *nouns]:
            self.said += _findings(clause, subject, alone=not nouns)
        self.carried = places[0].names if places else self.carried

    def place_last(self, place: Subject) -> bool:
        """A clause of nothing but a place may be that of the noun before: "a mass of 3 cm, in the rectum"."""
        if len(self.said) == self.begun:
            return False
        last = self.said[-1][0]
        if last.what in ORGANS or last.what in SITES or last.state != "present" or last.where not in ("", "colon"):
            return False
        self.said[-1] = (replace(last, where=place.names[0]), True)
        return True

    def give_state(self, clause: list[Token], i: int, subjects: list[Subject]) -> None:
        """Find whom a state is said of."""
        kind, state = clause[i]
        negated = _denied(clause, i)
        kinds = [token.kind for token in clause]
        after = next((j for j in range(i + 1, len(kinds)) if kinds[j] not in ("state", "adjective")), len(kinds))
        after += kinds[after : after + 1] == ["in"]
        follower = next((subject for subject in subjects if subject.start == after), None)
        before = [subject for subject in subjects if subject.end <= i]
        previous = next((k for k in reversed(kinds[:i]) if k not in ("not", "without")), "")
        follows = bool(before) and previous in ("place", "noun", "is")
        if follower and follower.kind == "noun" and kind == "adjective":
            return  # a small cyst is a cyst
        if follower and (not follows or (follower.kind == "noun" and kinds[i - 1] == "not")):
            follower.states.append((state, negated))
        elif before:
            # "The cyst in the left kidney is enlarged": the cyst is.
            nouns = [subject for subject in before if subject.kind == "noun"]
            inner = before[-1].kind == "place" and kinds[before[-1].start - 1 : before[-1].start] == ["in"]
            (nouns[-1] if inner and nouns else before[-1]).states.append((state, negated))
        elif subjects:
            subjects[0].states.append((state, negated))
        elif kind == "state" and state != "odd":
            state, firm = ("present" if negated or state == "normal" else state), state != "normal"
            self.said += [(Finding(name, state), firm) for name in self.carried if name in ORGANS]

    def give_place(self, clause: list[Token], noun: Subject, places: list[Subject]) -> None:
        """Find the place of a noun: "rectal" before it, "in the rectum" behind it, or "the rectum shows" before it."""
        kinds = [token.kind for token in clause]
        found = [place for place in places if place.end == noun.start and place.names != ("colon",)]
        found = found or [p for p in places if p.start >= noun.end and LEADS.fullmatch(_run(kinds[noun.end : p.start]))]
        found = found or [p for p in reversed(places) if p.end <= noun.start and _shares(kinds[p.end : noun.start])]
        if found:
            place = found[0]
            place.taken = True
            # "In an area of the left kidney": the place that is known.
            inner = [p for p in places if p.start == place.end + 1 and kinds[place.end] == "in"]
            place = inner[0] if inner and place.names[0] not in ORGANS | SITES else place
            place.taken = True
            noun.where = place.names
        elif kinds[0] in ("see", "without") or (noun.names == ("lesion",) and _denied(clause, noun.start)):
            noun.where = self.carried

    def give_sizes(self, clause: list[Token], subjects: list[Subject]) -> None:
        """Give each size to the subject before it, or the one behind; "it measures" goes on about the last finding."""
        for i, token in enumerate(clause):
            if token.kind != "size":
                continue
            free = [subject for subject in subjects if not subject.taken]
            near = [subject for subject in free if subject.end <= i][-1:] or free[:1]
            if near:
                near[0].size_cm = max(token.value, near[0].size_cm or 0)
            elif self.said:
                last, firm = self.said[-1]
                self.said[-1] = (replace(last, size_cm=max(token.value, last.size_cm or 0)), firm)


def _clauses(tokens: list[Token]) -> list[list[Token]]:
    """Cut a sentence where another statement begins, but not within a list."""
    clauses: list[list[Token]] = [[]]
    for i, token in enumerate(tokens):
        here, rest = clauses[-1], tokens[i + 1 :]
        about = [t.kind for t in here if t.kind not in ("and", "or", "in")]
        if token.kind in ("but", "without"):
            clauses.append([token])
        elif (
            token.kind == ","
            and set(about) == {"place"}
            and rest
            and rest[0].kind in ("noun", "state", "size", "article")
        ):
            here.append(Token("is"))  # "left kidney, cyst of 2 cm"
        elif token.kind == "," and _is_list(here, rest):
            here.append(Token("and"))
        elif token.kind == "," or (token.kind == "and" and _is_statement(here, rest)):
            clauses.append([])
        else:
            here.append(token)
    clauses = [[token for token in clause if token.kind not in ("article", "but")] for clause in clauses]
    return [[Token("and") if token.kind == "or" else token for token in clause] for clause in clauses if clause]


def _is_list(here: list[Token], rest: list[Token]) -> bool:
    """Whether a comma is part of a list: "spleen, liver and ...", "in the liver, or colon", "no mass, cyst or ..."."""
    kinds = [token.kind for token in rest]
    length = next((i for i, kind in enumerate(kinds) if kind not in ("place", "and", "or", ",")), len(kinds))
    if here and length and all(token.kind in ("place", "and", "or") for token in here):
        return True
    if here and here[-1].kind == "place" and length == len(kinds) and {"and", "or"} & set(kinds):
        return True
    stop = next((i for i, kind in enumerate(kinds) if kind in ("not", "without", "but", "is")), len(kinds))
    return any(token.kind in ("not", "without") for token in here) and "or" in kinds[:stop]


def _is_statement(here: list[Token], rest: list[Token]) -> bool:
    """Whether another statement follows an "and"."""
    kinds = [token.kind for token in rest]
    kinds = kinds[: kinds.index(",")] if "," in kinds else kinds
    if not kinds or not {token.kind for token in here} & {"state", "adjective", "not", "noun", "is", "see", "facts"}:
        return False
    ends = next((i for i, kind in enumerate(kinds) if kind not in ("place", "and", "or")), len(kinds))
    predicate = kinds[0] == "place" and kinds[ends : ends + 1] == ["state"]
    attribute = kinds[0] in ("state", "adjective") and kinds[1:2] in (["place"], ["noun"], ["in"])
    return kinds[0] == "article" or "is" in kinds or predicate or attribute


def _with_places(clause: list[Token]) -> list[Token]:
    """Make nouns places that stand as such: "fluid in the pelvis", "the gallbladder shows stones"."""
    # "Exophytic 3 cm left renal mass": a word before a known noun describes it.
    described = re.compile("((size|place) )*noun ")
    runs = [described.match(_run([token.kind for token in clause[i + 1 :]])) for i in range(len(clause))]
    last = [clause[i + run[0].count(" ")].value if run else "" for i, run in enumerate(runs)]
    clause = [token for token, noun in zip(clause, last) if not (_unknown(token) and noun in LESIONS)]
    for i, (kind, value) in enumerate(clause):
        if kind != "noun" or value in LESIONS:
            continue
        before, after = [[t.kind for t in part] for part in (clause[:i], clause[i + 1 :])]
        within = before[-1:] == ["in"] and "noun" in before and before[-2:-1] != ["state"]
        shows = [k for k in after if k != "is"][:1] in (["see"], ["not"]) and "noun" in after
        if within or (shows and not ("in" in after and after.index("in") < after.index("noun"))):
            clause[i] = Token("place", (value,))
    return clause


def _unknown(token: Token) -> bool:
    return token.kind == "noun" and token.value not in LESIONS | NOUNS


def _subjects(clause: list[Token]) -> list[Subject]:
    subjects: list[Subject] = []
    for i, (kind, value) in enumerate(clause):
        joined = subjects and kind == "place" and subjects[-1].kind == "place"
        if joined and all(token.kind == "and" for token in clause[subjects[-1].end : i]):
            subjects[-1].names += tuple(name for name in value if name not in subjects[-1].names)
            subjects[-1].end = i + 1
        elif kind in ("place", "noun"):
            subjects.append(Subject(value if kind == "place" else (value,), kind, i, i + 1))
    return subjects


def _run(kinds: list[str]) -> str:
    return "".join(f"{kind} " for kind in kinds)


def _shares(between: list[str]) -> bool:
    """Whether a place before a noun is its: of "hepatic steatosis and gallstones" the first alone is hepatic."""
    return between[:1] != ["and"] and ("and" not in between or "see" in between)


def _denied(clause: list[Token], i: int) -> bool:
    return any(token.kind in ("not", "without") for token in clause[:i])


def _denial(fact: Finding) -> Finding:
    return replace(fact, state="absent" if fact.state == "present" else "present")


def _means(noun: Subject, clause: list[Token]) -> bool:
    """Whether a noun is a finding; an unknown one is only if something is said of it, or nothing else is said."""
    kinds = {token.kind for token in clause}
    if "other" in kinds and kinds & {"not", "without"}:
        return False  # "No other mass" says nothing of this one.
    said = kinds & {"place", "not", "without", "size", "state", "see"}
    return bool(said) or noun.names[0] in LESIONS | NOUNS or THERE in clause or len(clause) == 1


def _findings(clause: list[Token], subject: Subject, alone: bool) -> list[tuple[Finding, bool]]:
    """Findings of a subject, with whether they say more than that it is there; ``alone``: the clause has no noun."""
    kinds = [token.kind for token in clause]
    rest = [kind for kind in kinds[subject.end :] if kind not in ("is", "see", "size")]
    behind = rest == ["not"]  # "Mass: none."
    if subject.kind == "noun":
        what = "tumour" if subject.names == ("lesion",) else subject.names[0]
        state = subject.state or ("absent" if behind or _denied(clause, subject.start) else "present")
        if what in LESIONS and state != "absent":
            state = "absent" if _denied(clause, subject.start) else "present"
        return [(Finding(what, state, where, subject.size_cm), True) for where in subject.where or ("",)]
    if not subject.state and subject.taken:
        return []
    denied = alone and (behind or kinds[: subject.start][-1:] in (["not"], ["without"])) and not subject.states
    state = subject.state or ("absent" if denied else "present")
    firm = bool(subject.state) or denied
    known = [name for name in subject.names if name in ORGANS or firm]
    return [(Finding(name, state, "", subject.size_cm), firm) for name in known]


def _merged(said: list[tuple[Finding, bool]]) -> tuple[Finding, ...]:
    """One finding of each organ, and of each noun in each place: the later, completed by the earlier."""
    held: list[Finding] = []
    for new, firm in said:
        same = [f for f in held if f.what == new.what and (f.where == new.where or not f.where or not new.where)]
        if not firm and same:
            new = replace(new, state=same[-1].state)
        if new.state == "absent" and new.where and any(not f.where for f in same):
            same = [f for f in same if f.where]  # a denial for one place leaves what is said of all others
        elif new.state != "absent" and same:
            last = next((f for f in reversed(same) if f.state != "absent"), new)
            size = max((s for s in (new.size_cm, last.size_cm) if s is not None), default=None)
            same = same if new.where else [f for f in same if f is last or f.state == "absent"]
            new = replace(new, where=new.where or last.where, size_cm=size)
        at = held.index(same[0]) if same else len(held)
        held = [f for f in held if not any(f is s for s in same)]
        held.insert(min(at, len(held)), new)
    return tuple(held)


# ---------------------------------------------------------------------------------------------------------------------
# Writing. Of each list the first is what is written without a generator.

HOLLOW = ("stomach", "urinary_bladder", "small_bowel", "duodenum", "colon")
PHRASES: dict[str, dict[str, list[str]]] = {
    "en": {
        "solid enlarged": ["The {what} is enlarged", "Enlarged {what}", "There is enlargement of the {what}"],
        "solid small": ["The {what} is small", "The {what} is atrophic", "Small {what}", "Shrunken {what}"],
        "hollow enlarged": ["The {what} is distended", "The {what} is full", "Distended {what}"],
        "hollow small": ["The {what} is collapsed", "The {what} is empty", "Collapsed {what}"],
        "absent": ["The {what} is absent", "The {what} has been removed", "Status post resection of the {what}"],
        "present": [
            "The {what} is normal",
            "The {what} is unremarkable",
            "Normal {what}",
            "The {what} is not enlarged",
        ],
        "all present": ["The {what} are normal", "The {what} are unremarkable", "No abnormality of the {what}"],
        "noun present": ["There is {a}{what}{of}{where}", "{a}{what}{of} is seen{where}", "{what}{where}{size}"],
        "noun absent": ["There is no {what}{where}", "No {what} is seen{where}", "No evidence of {what}{where}"],
        "noun enlarged": ["The {what}{where} is enlarged{size}"],
        "noun small": ["The {what}{where} is small{size}"],
        "male": ["Male, {age}", "A {age}-year-old man", "{age}-year-old male patient", "M/{age}"],
        "female": ["Female, {age}", "A {age}-year-old woman", "{age}-year-old female patient", "F/{age}"],
        "male only": ["Male patient", "The patient is a man"],
        "female only": ["Female patient", "The patient is a woman"],
        "age only": ["{age} years old", "Age: {age}"],
        "tumour": ["mass", "tumour", "lesion"],
        "where": [" in the {}"],
        "size": [", measuring {:.1f} cm", ", {:.1f} cm in diameter"],
        "of": [" of {:.1f} cm", " measuring {:.1f} cm"],
    },
    "zh": {
        "solid enlarged": ["{what}增大", "{what}肿大", "{what}体积增大"],
        "solid small": ["{what}缩小", "{what}萎缩", "{what}体积偏小"],
        "hollow enlarged": ["{what}明显充盈", "{what}扩张", "{what}过度充盈"],
        "hollow small": ["{what}空虚", "{what}充盈欠佳", "{what}塌陷"],
        "absent": ["{what}缺如", "{what}切除术后", "{what}术后缺如"],
        "present": ["{what}大小正常", "{what}未见异常", "{what}大小形态正常", "{what}不大"],
        "all present": ["{what}未见异常", "{what}大小形态正常", "{what}未见明显异常"],
        "noun present": ["{where}见{what}{size}", "{where}可见{of}{what}", "{where}{what}{size}"],
        "noun absent": ["{where}未见{what}", "{where}未见明确{what}", "{where}无{what}"],
        "noun enlarged": ["{where}见肿大{what}{size}"],
        "noun small": ["{where}{what}缩小{size}"],
        "male": ["男，{age}岁", "患者男性，{age}岁", "{age}岁男性患者"],  # noqa: RUF001
        "female": ["女，{age}岁", "患者女性，{age}岁", "{age}岁女性患者"],  # noqa: RUF001
        "male only": ["男性患者", "男性"],
        "female only": ["女性患者", "女性"],
        "age only": ["{age}岁", "年龄：{age}岁"],  # noqa: RUF001
        "tumour": ["肿块", "肿瘤", "占位"],
        "where": ["{}"],
        "size": ["，大小约{:.1f} cm", "，最大径约{:.1f} cm"],  # noqa: RUF001
        "of": ["大小约{:.1f} cm的", "直径约{:.1f} cm的"],
    },
}
# Words of one organ alone.
MORE = {
    ("spleen", "enlarged"): ["Splenomegaly"],
    ("spleen", "present"): ["No splenomegaly"],
    ("spleen", "absent"): ["Status post splenectomy"],
    ("liver", "enlarged"): ["Hepatomegaly"],
    ("liver", "present"): ["No hepatomegaly"],
    ("kidney_right", "absent"): ["Status post right nephrectomy"],
    ("kidney_left", "absent"): ["Status post left nephrectomy"],
}


def write_report(attributes: Attributes, language: str = "en", rng: np.random.Generator | None = None) -> str:
    """Put findings into words, which `parse_report` reads as the same findings.

    Args:
        attributes: what to say. Sizes keep one decimal.
        language: ``"en"`` or ``"zh"``.
        rng: draws the order and the words; without it each finding has one wording, in the order given.

    Returns:
        A sentence for each finding, or for all normal organs together; nothing of the empty attributes.
    """
    if language not in PHRASES:
        raise ValueError(f"language {language!r} is unknown: choose one of {', '.join(PHRASES)}")
    pick: Callable[[Sequence[str]], str] = (lambda c: c[0]) if rng is None else (lambda c: c[int(rng.integers(len(c)))])
    findings = list(attributes.findings)
    normal = [f for f in findings if f.what in ORGANS and f.state == "present" and f.size_cm is None]
    together = rng is not None and len(normal) > 1 and rng.random() < 0.5
    sentences = [_sentence(f, language, pick) for f in findings if not (together and f in normal)]
    if together:
        sentences.append(_enumeration([f.what for f in normal], language, pick))
    if rng is not None:
        sentences = [sentences[i] for i in rng.permutation(len(sentences))]
    sentences = [sentence for sentence in (_introduction(attributes, language, pick), *sentences) if sentence]
    if language == "zh":
        return "".join(f"{sentence}。" for sentence in sentences)
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def _sentence(finding: Finding, language: str, pick: Callable[[Sequence[str]], str]) -> str:
    """Words for one finding, without the full stop."""
    phrases = PHRASES[language]
    size = "" if finding.size_cm is None else pick(phrases["size"]).format(finding.size_cm)
    if finding.what in ORGANS:
        kind = "hollow" if finding.what in HOLLOW else "solid"
        choices = phrases[finding.state if finding.state in ("absent", "present") else f"{kind} {finding.state}"]
        choices = choices + (MORE.get((finding.what, finding.state), []) if language == "en" else [])
        return pick(choices).format(what=_name(finding.what, language)) + size
    denied = finding.state == "absent"
    what = pick(phrases["tumour"][: 2 if denied else 3]) if finding.what == "tumour" else _name(finding.what, language)
    return pick(phrases[f"noun {finding.state}"]).format(
        what=what,
        a="a " if finding.what in ("tumour", "cyst") else "",
        where=phrases["where"][0].format(_name(finding.where, language)) if finding.where else "",
        size=size,
        of="" if finding.size_cm is None else pick(phrases["of"]).format(finding.size_cm),
    )


def _enumeration(organs: list[str], language: str, pick: Callable[[Sequence[str]], str]) -> str:
    """Words for several normal organs."""
    names = [_name(organ, language) for organ in organs]
    *first, last = names
    listed = "、".join(names) if language == "zh" else f"{', '.join(first)} and {last}"
    return pick(PHRASES[language]["all present"]).format(what=listed)


def _introduction(attributes: Attributes, language: str, pick: Callable[[Sequence[str]], str]) -> str:
    """Words for sex and age."""
    if attributes.age is None:
        return pick(PHRASES[language][f"{attributes.sex} only"]) if attributes.sex else ""
    return pick(PHRASES[language][attributes.sex or "age only"]).format(age=attributes.age)


def _name(what: str, language: str) -> str:
    """First word of the language for a name; any other noun stays."""
    words = (ORGANS | SITES | LESIONS | NOUNS).get(what, (what,))
    return next((word for word in words if word.isascii() == (language == "en")), what)


# ---------------------------------------------------------------------------------------------------------------------
# Listing


def list_reports(path: str | os.PathLike, num_samples: int = 1, seed: int = 0, strict: bool = True) -> list[Case]:
    """List reports as cases.

    Args:
        path: a .txt file of one report a line, but for blank lines and those that begin with ``#``; a folder of .txt
            files of one report each, or one that has them in a folder ``REPORT``; or a .json list of ``{"name",
            "report"}``, or of reports, where a report is text or the path of a .txt file. With ``"layout"``, the path
            of a mask of one's own, an entry needs no report. Paths are relative to the list; names are optional.
        num_samples: how many differently seeded samples of every case.
        seed: the run's seed.
        strict: raise for bad cases at once; else they carry an ``error``, which `CaseStream` reports at its end.

    Returns:
        cases ``{"name", "report", "seed"}``, and what else a list's entries hold.
    """
    root = Path(path).absolute()
    if root.is_dir():
        found = _read_folder(root)
    elif root.suffix == ".json":
        found = _read_list(root)
    elif root.suffix != ".txt" and root.exists():
        raise CaseError(f"{root} holds no reports: give a .txt of one on each line, a folder of .txt, or a .json list")
    else:
        lines = [line.strip() for line in _read_text(root).split("\n")]
        lines = [line for line in lines if line and not line.startswith("#")]
        found = [{"name": f"report_{i:04d}", "report": line} for i, line in enumerate(lines, start=1)]
    if not found:
        raise CaseError(f"{root} holds no report: expected one on each line of a .txt, .txt files, or a .json list")
    names = [case["name"] for case in found]
    cases = {name: case for name, case in zip(names, found)}
    for name in {name for name in names if names.count(name) > 1}:
        cases[name] = {**cases[name], "error": f'{root} names case {name} twice: give each entry a different "name"'}
    if strict and (errors := [case["error"] for case in cases.values() if "error" in case]):
        raise CaseError("\n".join(errors))
    return seeded(list(cases.values()), num_samples, seed)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: give a .txt of reports, a folder of them, or a list") from None
    except UnicodeDecodeError as error:
        raise CaseError(f"{path} is not text in UTF-8 ({error}): save it so") from error


def _read_report(path: Path) -> Case:
    """A file's report, or the error."""
    try:
        text = _read_text(path).strip()
    except (CaseError, OSError) as error:
        return {"report": "", "error": str(error)}
    return {"report": text} if text else {"report": "", "error": f"{path} is empty: write a report, or remove the file"}


def _read_folder(root: Path) -> list[Case]:
    folder = root / "REPORT" if (root / "REPORT").is_dir() else root
    files = sorted(file for file in folder.iterdir() if file.suffix == ".txt" and not file.name.startswith("."))
    return [{"name": stem(file), **_read_report(file)} for file in files]


def _read_list(path: Path) -> list[Case]:
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise CaseError(f"{path} is not valid JSON ({error}): correct it") from error
    if not isinstance(content, list):
        raise CaseError(f'{path} holds a {type(content).__name__}, expected a list of {{"name", "report"}}')
    entries = [{"report": entry} if isinstance(entry, str) else entry for entry in content]
    return [_entry(entry, path, i) for i, entry in enumerate(entries, start=1)]


def _entry(entry: Any, path: Path, i: int) -> Case:
    """Case of a list's entry, or the error."""
    place = f"{path}, entry {i}"
    if not isinstance(entry, dict):
        return {"name": f"report_{i:04d}", "report": "", "error": f"{place}: is {entry!r:.40}, expected a report"}
    case = {"name": f"report_{i:04d}", "report": "", **{k: v for k, v in entry.items() if v is not None}}
    if isinstance(case["report"], str) and case["report"].endswith(".txt"):
        file = path.parent / case["report"]
        case |= ({} if "name" in entry else {"name": stem(file)}) | _read_report(file)
    if "layout" in case:
        case["layout"] = str(path.parent / str(case["layout"]))
    wrong = _wrong(case)
    return {**case, "name": str(case["name"])} | ({"report": "", "error": f"{place}: {wrong}"} if wrong else {})


def _wrong(case: Case) -> str:
    """What is wrong with an entry, and what to do."""
    if str(case["name"]) != Path(str(case["name"])).name:
        return f"is named {case['name']!r}: a name becomes a file name, use no slashes"
    if not isinstance(case["report"], str):
        return f"report is {case['report']!r:.40}, expected text"
    if "layout" in case and not os.path.isfile(case["layout"]):
        return f"layout {case['layout']} is not a file: paths are relative to the list"
    if not case["report"].strip() and "layout" not in case:
        return str(case.get("error") or 'has no report: write one under "report", or name a mask under "layout"')
    return ""
