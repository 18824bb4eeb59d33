"""Reports are read as what they say, and written so that reading gives the same back."""

from __future__ import annotations

import doctest
import json

import numpy as np
import pytest

import common.reports
from common.io import CaseError
from common.reports import ORGANS, SITES, Attributes, Finding, list_reports, parse_report, write_report

KNOWN = ("spleen", "liver", "kidney_right", "kidney_left", "urinary_bladder", "stomach")
REMOVABLE = ("spleen", "kidney_right", "kidney_left")


def draw(rng: np.random.Generator) -> Attributes:
    """What a phantom may be: organs and their states, a tumour or none, other findings, a person."""
    findings = []
    for organ in KNOWN:
        states = ["present", "enlarged", "small", *["absent"] * (organ in REMOVABLE)]
        if rng.random() < 0.7:
            findings.append(Finding(organ, str(rng.choice(states))))
    if rng.random() < 0.7:
        size = round(float(rng.uniform(2, 7)), 1) if rng.random() < 0.9 else None
        findings.append(Finding("tumour", where=str(rng.choice(list(SITES))), size_cm=size))
    elif rng.random() < 0.7:
        findings.append(Finding("tumour", "absent"))
    if rng.random() < 0.3:
        findings.append(Finding("cyst", where=str(rng.choice(["liver", "kidney_left"])), size_cm=1.5))
    if rng.random() < 0.3:
        findings.append(Finding("ascites", str(rng.choice(["present", "absent"]))))
    if rng.random() < 0.2:
        findings.append(Finding("lymph nodes", "enlarged"))
    age = int(rng.integers(1, 100)) if rng.random() < 0.7 else None
    return Attributes(tuple(findings), str(rng.choice(["", "male", "female"])), age)


def told(text: str) -> set[str]:
    """What a text says, in short."""
    attributes = parse_report(text)
    said = {attributes.sex, "" if attributes.age is None else f"age {attributes.age}"} - {""}
    for f in attributes.findings:
        said.add(f"{f.what} {f.state}{f' in {f.where}' * bool(f.where)}{'' if f.size_cm is None else f' {f.size_cm}'}")
    return said


def test_example():
    assert doctest.testmod(common.reports).failed == 0


# ---------------------------------------------------------------------------------------------------------------------
# Round trip


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("varied", [True, False])
def test_what_is_written_is_read(language, varied):
    texts = set()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        attributes = draw(rng)
        text = write_report(attributes, language, rng if varied else None)
        read = parse_report(text)
        assert len(read.findings) == len(attributes.findings), text
        assert set(read.findings) == set(attributes.findings), text
        assert (read.sex, read.age) == (attributes.sex, attributes.age), text
        texts.add(text)
    assert len(texts) > 250


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_wording_of_every_finding_is_read(language):
    organs = [Finding(organ, state) for organ in ORGANS for state in ("present", "absent", "enlarged", "small")]
    nouns = [Finding("tumour", state, site) for state in ("present", "absent") for site in ("", *SITES)]
    nouns += [Finding(what, state) for what in ("gallbladder", "prostate") for state in ("enlarged", "small", "absent")]
    sizes = [
        Finding("tumour", size_cm=3.0),
        Finding("spleen", "enlarged", size_cm=14.5),
        Finding("liver", size_cm=18.0),
    ]
    rng = np.random.default_rng(0)
    for finding in [*organs, *nouns, *sizes]:
        for text in {write_report(Attributes((finding,)), language, rng) for _ in range(40)}:
            assert parse_report(text).findings == (finding,), text


def test_without_a_generator_the_wording_is_fixed():
    attributes = Attributes((Finding("spleen", "absent"), Finding("tumour", where="rectum", size_cm=3.04)), "male", 63)
    assert write_report(attributes) == "Male, 63. The spleen is absent. There is a mass of 3.0 cm in the rectum."
    assert write_report(attributes, "zh") == "男，63岁。脾脏缺如。直肠见肿块，大小约3.0 cm。"  # noqa: RUF001
    assert write_report(Attributes()) == write_report(Attributes(), "zh", np.random.default_rng(0)) == ""


def test_the_generator_alone_decides_on_the_wording():
    attributes = draw(np.random.default_rng(1))
    texts = [write_report(attributes, "en", np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_an_unknown_language():
    with pytest.raises(ValueError, match="language 'fr' is unknown: choose one of en, zh"):
        write_report(Attributes(), "fr")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize(
    "text",
    [
        *("No splenomegaly.", "Without splenomegaly", "no evidence of splenomegaly", "The spleen is not enlarged."),
        *(
            "Spleen normal in size",
            "The spleen is unremarkable.",
            "Spleen: not enlarged",
            "no enlargement of the spleen",
        ),
        *("The spleen isn’t enlarged", "Neither liver nor spleen is enlarged", "No abnormality of the spleen"),  # noqa: RUF001
        *("The spleen is neither enlarged nor small.", "Spleen no longer enlarged", "The spleen is not absent"),
        *(
            "脾不大",
            "脾脏未见肿大。",
            "未见脾大",
            "无脾肿大",
            "脾脏未见异常",
            "脾脏大小正常",
            "无肝脾肿大",
            "脾脏未增大",
        ),
    ],
)
def test_a_denied_state_leaves_the_organ(text):
    assert "spleen present" in told(text)
    assert not told(text) - {"spleen present", "liver present"}


@pytest.mark.parametrize(
    "text",
    [
        *("No mass.", "no tumour", "There is no tumor.", "Without a mass", "no evidence of carcinoma", "Tumour: none."),
        *(
            "Mass: absent",
            "A mass is not seen.",
            "No masses are identified",
            "Negative for malignancy",
            "Free of tumour",
        ),
        *("no colorectal cancer", "No lesion is seen.", "Absence of a mass", "There is neither mass nor tumour."),
        *("未见肿块", "无肿瘤", "未见明显占位", "没有肿块", "未发现肿瘤", "结直肠未见占位性病变"),
    ],
)
def test_a_denied_tumour_is_absent(text):
    assert told(text) == {"tumour absent"}


PERSONS = [
    ("male, 63", "male", 63),
    ("63-year-old woman", "female", 63),
    ("A 67-year-old gentleman", "male", 67),
    ("F/55", "female", 55),
    ("55M", "male", 55),
    ("63 y/o M", "male", 63),
    ("a 45 year old female", "female", 45),
    ("Age 70, sex F", "female", 70),
    ("a lady, 81 years old", "female", 81),
    ("Male patient, aged 7.", "male", 7),
    ("男，63岁", "male", 63),  # noqa: RUF001
    ("女性 55 岁", "female", 55),
    ("患者女，７２岁", "female", 72),  # noqa: RUF001
    ("性别：男 年龄：63岁", "male", 63),  # noqa: RUF001
    ("58周岁男性", "male", 58),
    ("male", "male", None),
    ("女", "female", None),
    ("24 years old", "", 24),
    ("male, 3.5 cm mass in the rectum", "male", None),
    ("Female, 2 cysts in the liver", "female", None),
    ("splenectomy 5 years ago", "", None),
    ("male, 630", "male", None),
]


@pytest.mark.parametrize(("text", "sex", "age"), PERSONS)
def test_persons(text, sex, age):
    read = parse_report(text)
    assert (read.sex, read.age) == (sex, age)
    assert parse_report(f"{text}. The spleen is enlarged.").findings[-1] == Finding("spleen", "enlarged")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("3.5 cm", 3.5), ("35 mm", 3.5), ("3 x 2.5 cm", 3.0), ("2.5cm×3cm×1cm", 3.0), ("35mm*20mm", 3.5)),  # noqa: RUF001
        *(("3-cm", 3.0), ("2 to 3 cm", 3.0), ("３．５ｃｍ", 3.5), ("3,5 cm", 3.5), ("4 centimetres", 4.0)),  # noqa: RUF001
        *(("3.5厘米", 3.5), ("35毫米×20毫米", 3.5), ("3.5㎝", 3.5), ("4 by 3 cm", 4.0)),  # noqa: RUF001
    ],
)
def test_sizes(text, size):
    for frame in ("A mass of {} in the rectum.", "Rectal mass, {}.", "Rectal mass ({})", "直肠肿块，大小约{}。"):  # noqa: RUF001
        assert parse_report(frame.format(text)).findings == (Finding("tumour", where="rectum", size_cm=size),)


LEFT_SMALL = "kidney_left small"
BOTH = {"kidney_left present", "kidney_right present"}
ENGLISH = [
    ("male, 63, mass in the sigmoid colon, 3.5 cm", "male; age 63; tumour present in sigmoid colon 3.5"),
    (
        "A 67-year-old gentleman with a 5 cm lesion in the caecum and an enlarged liver.",
        "male; age 67; tumour present in caecum 5.0; liver enlarged",
    ),
    (
        "63M, rectal mass 35 x 20 mm, both kidneys atrophic",
        "male; age 63; tumour present in rectum 3.5; kidney_left small; kidney_right small",
    ),
    (
        "male 63, no tumour, splenomegaly, small left kidney",
        f"male; age 63; tumour absent; spleen enlarged; {LEFT_SMALL}",
    ),
    ("Enlarged liver and spleen.", "liver enlarged; spleen enlarged"),
    (
        "The liver and spleen are enlarged, the left kidney is small.",
        f"liver enlarged; spleen enlarged; {LEFT_SMALL}",
    ),
    (
        "The spleen is not enlarged and the left kidney is absent; bladder full.",
        "spleen present; kidney_left absent; urinary_bladder enlarged",
    ),
    ("mass in the sigmoid colon, left kidney absent", "tumour present in sigmoid colon; kidney_left absent"),
    ("Neither kidney is enlarged.", "kidney_left present; kidney_right present"),
    ("Normal liver, spleen and stomach.", "liver present; spleen present; stomach present"),
    ("Spleen, liver, pancreas unremarkable.", "liver present; spleen present; pancreas present"),
    ("The left kidney is not visualised.", "kidney_left absent"),
    ("Spleen and left kidney surgically absent", "spleen absent; kidney_left absent"),
    ("Status post splenectomy and left nephrectomy.", "spleen absent; kidney_left absent"),
    ("Left nephrectomy 5 years ago; right kidney hypertrophied.", "kidney_left absent; kidney_right enlarged"),
    ("Solitary right kidney.", "kidney_left absent"),
    ("no left kidney", "kidney_left absent"),
    ("Partial nephrectomy of the left kidney.", "kidney_left present"),
    ("the patient had his spleen removed", "spleen absent"),
    ("The spleen, which is enlarged, measures 15 cm", "spleen enlarged 15.0"),
    ("The spleen is enlarged with normal attenuation.", "spleen enlarged"),
    ("Liver is enlarged. Liver is normal.", "liver present"),
    ("The spleen is absent. The spleen measures 9 cm.", "spleen absent 9.0"),
    ("Bladder: full; stomach: collapsed", "urinary_bladder enlarged; stomach small"),
    ("Unremarkable except for an enlarged spleen.", "spleen enlarged"),
    ("No mass, but the spleen is enlarged.", "tumour absent; spleen enlarged"),
    ("Small spleen, full bladder, no colorectal tumour", "spleen small; urinary_bladder enlarged; tumour absent"),
    ("A mass is seen in the ascending colon. It measures 4.5 cm.", "tumour present in ascending colon 4.5"),
    ("Rectal carcinoma 5 cm from the anal verge, 3.0 cm in diameter.", "tumour present in rectum 3.0"),
    ("Colon cancer, sigmoid, 3 cm.", "tumour present in sigmoid colon 3.0"),
    ("Mass 3 cm, in the sigmoid colon", "tumour present in sigmoid colon 3.0"),
    ("2-cm tumor at the hepatic flexure", "tumour present in ascending colon 2.0"),
    ("There is a mass in the\nsigmoid colon.", "tumour present in sigmoid colon"),
    ("Large mass of the transverse colon. No other mass.", "tumour present in transverse colon"),
    ("A mass in the rectum. No mass.", "tumour absent"),
    (
        "3 cm mass in the rectum. The liver is normal in size, no focal lesion.",
        "tumour present in rectum 3.0; liver present; tumour absent in liver",
    ),
    ("The mass in the rectum has been removed.", "tumour absent in rectum"),
    (
        "No mass in the liver, spleen, or colon.",
        "tumour absent in liver; tumour absent in spleen; tumour absent in colon",
    ),
    (
        "Sigmoid colon cancer with liver metastases.",
        "tumour present in sigmoid colon; metastases present in liver",
    ),
    (
        "No renal mass. Solid 3 cm tumor in the left kidney.",
        "tumour absent in kidney; tumour present in kidney_left 3.0",
    ),
    ("a 2 cm cyst in the left kidney", "cyst present in kidney_left 2.0"),
    ("Small left kidney with a 1.2 cm cyst.", f"{LEFT_SMALL}; cyst present in kidney_left 1.2"),
    ("The left kidney contains a small cyst.", "cyst present in kidney_left"),
    ("Multiple cysts in both kidneys.", "cyst present in kidney_left; cyst present in kidney_right"),
    ("Mild hepatic steatosis and gallstones.", "steatosis present in liver; gallstones present"),
    ("No ascites or pleural effusion.", "ascites absent; pleural effusion absent"),
    ("No mass, ascites, or lymphadenopathy.", "tumour absent; ascites absent; lymphadenopathy absent"),
    ("Free fluid in the pelvis.", "free fluid present in pelvis"),
    ("Enlarged lymph nodes in the mesentery.", "lymph nodes enlarged in mesentery"),
    ("No enlarged lymph nodes.", "lymph nodes present"),
    ("Gallbladder: distended, without stones.", "gallbladder enlarged; stone absent"),
    ("Small bowel obstruction.", "obstruction present in small_bowel"),
    ("The patient was scanned in the portal venous phase after administration of contrast.", ""),
    ("The splenic vein is dilated.", "splenic vein enlarged"),
    ("", ""),
    ("no no no", ""),
    ("El bazo está aumentado de tamaño", ""),
]
CHINESE = [
    (
        "患者女，72岁，升结肠占位，大小约4.5×3.2厘米，脾切除术后。",  # noqa: RUF001
        "female; age 72; tumour present in ascending colon 4.5; spleen absent",
    ),
    (
        "男性，58岁。直肠壁增厚，见软组织肿块，大小约35mm×28mm，距肛缘约5cm。",  # noqa: RUF001
        "male; age 58; wall thickening present in rectum; tumour present in rectum 3.5",
    ),
    ("女，45岁，横结肠癌，3.6cm", "female; age 45; tumour present in transverse colon 3.6"),  # noqa: RUF001
    ("性别：男 年龄：63岁 诊断：降结肠癌", "male; age 63; tumour present in descending colon"),  # noqa: RUF001
    ("男,70岁,无肿瘤,脾脏缺如", "male; age 70; tumour absent; spleen absent"),
    ("盲肠肿瘤６ｃｍ，膀胱空虚", "tumour present in caecum 6.0; urinary_bladder small"),  # noqa: RUF001
    ("直肠癌根治术后", "tumour absent in rectum"),
    ("未见明显肿块。肝脏增大，胃空虚。", "tumour absent; liver enlarged; stomach small"),  # noqa: RUF001
    ("肝脾肿大，双肾萎缩。", "liver enlarged; spleen enlarged; kidney_left small; kidney_right small"),  # noqa: RUF001
    ("肝不大，脾大。", "liver present; spleen enlarged"),  # noqa: RUF001
    ("脾脏体积增大，密度均匀", "spleen enlarged"),  # noqa: RUF001
    ("脾脏未见显示", "spleen absent"),
    ("左肾切除术后，右肾代偿性增大。", "kidney_left absent; kidney_right enlarged"),  # noqa: RUF001
    ("脾脏、左肾缺如", "spleen absent; kidney_left absent"),
    ("脾脏增大 左肾缺如 膀胱充盈", "spleen enlarged; kidney_left absent; urinary_bladder enlarged"),
    ("肝脏、脾脏、胰腺未见异常", "liver present; spleen present; pancreas present"),
    ("左、右肾未见异常", "kidney_left present; kidney_right present"),
    ("膀胱充盈良好，壁不厚", "urinary_bladder present"),  # noqa: RUF001
    ("膀胱充盈欠佳", "urinary_bladder small"),
    ("胃腔明显扩张", "stomach enlarged"),
    ("左肾可见一枚直径约2cm的囊肿", "cyst present in kidney_left 2.0"),
    ("双侧肾脏大小正常，左肾小囊肿", "kidney_left present; kidney_right present; cyst present in kidney_left"),  # noqa: RUF001
    (
        "肝脏形态、大小正常，肝实质内未见明显占位性病变。乙状结肠见占位，约3cm。",  # noqa: RUF001
        "liver present; tumour absent in liver; tumour present in sigmoid colon 3.0",
    ),
    ("腹膜后未见肿大淋巴结", "lymph nodes present in 腹膜后"),
    ("胆囊结石，左肾积水", "gallstones present; hydronephrosis present in kidney_left"),  # noqa: RUF001
    ("肾上腺未见异常", "adrenal glands present"),
    ("腹腔未见积液", "积液 absent in 腹腔"),
    ("。，；", ""),  # noqa: RUF001
]


@pytest.mark.parametrize(("text", "expected"), [*ENGLISH, *CHINESE])
def test_hard_sentences(text, expected):
    assert told(text) == set(expected.split("; ")) - {""}


def test_case_spacing_and_full_width_do_not_matter():
    text = "Male, 63. Enlarged spleen; a mass of 3.5 cm in the rectum."
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)
    for other in (text.upper(), text.replace(" ", "  "), text.replace(". ", ".\r\n"), wide):
        assert parse_report(other) == parse_report(text)


def test_every_word_of_every_name_is_known():
    for names in (ORGANS, SITES):
        for name, words in names.items():
            for word in words:
                assert parse_report(f"a mass in the {word}").findings == (Finding("tumour", where=name),), word
                assert parse_report(f"{word}见肿块").findings == (Finding("tumour", where=name),), word


def test_nothing_raises():
    rng = np.random.default_rng(0)
    words = list(common.reports.LEXICON) + [
        ",",
        ".",
        "3 cm",
        "2 x 3 mm",
        "63",
        "year",
        "\n",
        "lung",
        "肺",
        "(",
        "-",
        "\0",
    ]
    for _ in range(300):
        text = str(rng.choice(["", " "])).join(rng.choice(words, 25))
        read = parse_report(text)
        assert all(f.what and f.state in ("present", "absent", "enlarged", "small") for f in read.findings)
        # Once per organ, and per noun and place.
        assert len({(f.what, f.where) for f in read.findings}) == len(read.findings)
        assert parse_report(text) == read
    parse_report("".join(map(chr, rng.integers(1, 0xD7FF, 3000))))


# ---------------------------------------------------------------------------------------------------------------------
# Listing


def test_a_file_has_a_report_on_each_line(tmp_path):
    path = tmp_path / "reports.txt"
    path.write_text("\ufeff# ours\nA mass.\n\n  脾大。 \r\n", encoding="utf-8")
    cases = list_reports(path, seed=3)
    assert [(case["name"], case["report"]) for case in cases] == [("report_0001", "A mass."), ("report_0002", "脾大。")]
    assert len({case["seed"] for case in cases}) == 2
    assert cases == list_reports(str(path), seed=3) != list_reports(path, seed=4)


def test_a_folder_has_a_report_in_each_file(tmp_path):
    for folder in (tmp_path / "flat", tmp_path / "cohort" / "REPORT"):
        folder.mkdir(parents=True)
        (folder / "b.txt").write_text("Male.\nA mass.\n")
        (folder / "a.1.txt").write_text("脾大。", encoding="utf-8")
        (folder / "notes.md").write_text("no report")
    expected = [("a.1", "脾大。"), ("b", "Male.\nA mass.")]
    assert [(case["name"], case["report"]) for case in list_reports(tmp_path / "flat")] == expected
    assert [(case["name"], case["report"]) for case in list_reports(tmp_path / "cohort")] == expected


def test_a_list_has_entries(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("From a file.\n")
    (tmp_path / "mask.nii.gz").write_bytes(b"mask")
    entries = ["A mass.", {"name": "mine", "report": "Male.", "note": 3}, {"report": "texts/one.txt"}]
    entries += ["texts/one.txt", {"name": "drawn", "layout": "mask.nii.gz"}]
    entries[3] = {"name": "again", "report": entries[3]}
    (tmp_path / "list.json").write_text(json.dumps(entries))
    cases = {case.pop("name"): case for case in list_reports(tmp_path / "list.json")}
    assert {name: case["report"] for name, case in cases.items()} == {
        "report_0001": "A mass.",
        "mine": "Male.",
        "one": "From a file.",
        "again": "From a file.",
        "drawn": "",
    }
    assert cases["mine"]["note"] == 3
    assert cases["drawn"]["layout"] == str(tmp_path / "mask.nii.gz")


def test_several_samples_of_each(tmp_path):
    (tmp_path / "r.txt").write_text("A\nB\n")
    cases = list_reports(tmp_path / "r.txt", num_samples=2)
    assert [case["name"] for case in cases] == ["report_0001_s0", "report_0001_s1", "report_0002_s0", "report_0002_s1"]
    assert len({case["seed"] for case in cases}) == 4


LISTS = [
    ("[{}]", r"list\.json, entry 1: has no report: write one under \"report\", or name a mask under \"layout\""),
    ('["ok", ""]', r"entry 2: has no report"),
    ("[3]", "entry 1: is 3, expected a report"),
    ('[{"report": 3}]', "entry 1: report is 3, expected text"),
    ('[{"report": "none.txt"}]', r"entry 1: .*none\.txt does not exist: give"),
    ('[{"report": "empty.txt"}]', r"entry 1: .*empty\.txt is empty: write a report, or remove the file"),
    ('[{"report": "latin.txt"}]', r"entry 1: .*latin\.txt is not text in UTF-8 .*: save it so"),
    ('[{"layout": "none.nii.gz"}]', r"entry 1: layout .*none\.nii\.gz is not a file: paths are relative to the list"),
    ('[{"name": "a/b", "report": "A"}]', "entry 1: is named 'a/b': a name becomes a file name, use no slashes"),
    (
        '[{"name": "a", "report": "A"}, {"name": "a", "report": "B"}]',
        r'list\.json names case a twice: give each entry a different "name"',
    ),
]


@pytest.mark.parametrize(("content", "message"), LISTS)
def test_bad_entries(tmp_path, content, message):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(CaseError, match=message):
        list_reports(path)
    assert [case["name"] for case in list_reports(path, strict=False) if "error" in case]
    assert all("seed" in case and isinstance(case["report"], str) for case in list_reports(path, strict=False))


def test_bad_lists_are_refused_in_any_case(tmp_path):
    for content, message in (("{", "is not valid JSON"), ("{}", "holds a dict, expected a list"), ("[]", "no report")):
        (tmp_path / "list.json").write_text(content)
        with pytest.raises(CaseError, match=rf"list\.json .*{message}"):
            list_reports(tmp_path / "list.json", strict=False)


def test_bad_files_and_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CaseError, match=r"empty holds no report: expected one on each line of a \.txt, \.txt files, or"
    ):
        list_reports(tmp_path / "empty")
    (tmp_path / "blank.txt").write_text("# nothing\n\n")
    with pytest.raises(CaseError, match=r"blank\.txt holds no report"):
        list_reports(tmp_path / "blank.txt")
    (tmp_path / "ct.nii.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(CaseError, match=r"ct\.nii\.gz holds no reports: give a \.txt"):
        list_reports(tmp_path / "ct.nii.gz")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(CaseError, match=r"latin\.txt is not text in UTF-8"):
        list_reports(tmp_path / "latin.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist: give a \.txt of reports"):
        list_reports(tmp_path / "none.txt")


def test_a_bad_file_of_a_folder_spoils_no_other(tmp_path):
    (tmp_path / "good.txt").write_text("A mass.")
    (tmp_path / "blank.txt").write_text("")
    with pytest.raises(CaseError, match=r"blank\.txt is empty"):
        list_reports(tmp_path)
    blank, good = list_reports(tmp_path, strict=False)
    assert "error" in blank
    assert "error" not in good
