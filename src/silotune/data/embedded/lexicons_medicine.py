"""Hand-written textbook facts of eight medical specialties, from which synthetic exam questions are composed.

The facts are plausible one-line simplifications for training small models. They are not medical advice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """One illness: two findings, the investigation that shows it, its first treatment, and its cause."""

    name: str
    findings: tuple[str, str]
    investigation: str
    treatment: str
    cause: str


@dataclass(frozen=True)
class Specialty:
    """One field of medicine and its conditions; every fact is unlike the others of its kind."""

    name: str
    conditions: tuple[Condition, ...]


def _specialty(name: str, rows: tuple[tuple[str, str, str, str, str, str], ...]) -> Specialty:
    return Specialty(name, tuple(Condition(row[0], (row[1], row[2]), row[3], row[4], row[5]) for row in rows))


# Each row: condition, finding, finding, investigation, treatment, cause.
CARDIOLOGY = _specialty("cardiology", (
    ("stable angina", "chest pain on exertion", "relief at rest",
     "stress test", "nitrates", "narrowed coronary arteries"),
    ("atrial fibrillation", "an irregular pulse", "palpitations",
     "electrocardiogram", "anticoagulants", "chaotic atrial signals"),
    ("pericarditis", "pain eased by leaning forward", "a friction rub",
     "echocardiogram", "colchicine", "viral inflammation of the pericardium"),
    ("heart failure", "swollen ankles", "breathlessness lying flat",
     "natriuretic peptide", "loop diuretics", "a weak ventricle"),
    ("aortic dissection", "tearing back pain", "unequal arm pressures",
     "CT angiogram", "urgent surgery", "a torn aortic wall"),
    ("endocarditis", "a new murmur", "splinter haemorrhages",
     "blood cultures", "intravenous antibiotics", "bacteria on a valve"),
    ("complete heart block", "a very slow pulse", "sudden faints",
     "rhythm monitor", "pacemaker", "failed atrial conduction"),
    ("renal hypertension", "high pressure in youth", "an abdominal bruit",
     "renal duplex scan", "angioplasty", "a narrowed renal artery"),
))  # fmt: skip
RESPIRATORY = _specialty("respiratory", (
    ("asthma", "wheeze at night", "cough after exercise", "peak flow diary", "inhaled steroids", "airway allergy"),
    ("pneumonia", "fever with rusty sputum", "bronchial breathing", "chest radiograph", "amoxicillin", "pneumococcus"),
    ("tuberculosis", "night sweats", "blood in the sputum", "sputum smear", "rifampicin", "an acid-fast bacillus"),
    ("pulmonary embolism", "sudden breathlessness", "a swollen calf",
     "pulmonary angiogram", "heparin", "a clot from the leg"),
    ("pneumothorax", "sudden one-sided pain", "absent breath sounds",
     "erect chest film", "chest drain", "a burst bleb"),
    ("emphysema", "a barrel chest", "pursed-lip breathing", "spirometry", "tiotropium", "long smoking"),
    ("cystic fibrosis", "salty skin", "recurrent chest infection",
     "sweat test", "pancreatic enzymes", "a chloride channel gene"),
    ("sleep apnoea", "loud snoring", "daytime sleepiness",
     "sleep study", "airway pressure mask", "collapse of the throat"),
))  # fmt: skip
GASTROENTEROLOGY = _specialty("gastroenterology", (
    ("coeliac disease", "pale bulky stools", "an itchy blistering rash",
     "tissue antibody test", "gluten-free diet", "reaction to wheat"),
    ("duodenal ulcer", "pain eased by food", "black stools",
     "urea breath test", "proton pump inhibitor", "Helicobacter"),
    ("ulcerative colitis", "bloody diarrhoea", "urgency at stool",
     "colonoscopy", "mesalazine", "immune attack on the colon"),
    ("gallstones", "pain after fatty meals", "tenderness under the right ribs",
     "abdominal ultrasound", "gall bladder removal", "cholesterol crystals"),
    ("acute pancreatitis", "pain boring to the back", "relentless vomiting",
     "serum lipase", "fluids and rest", "alcohol excess"),
    ("haemochromatosis", "bronzed skin", "aching knuckles",
     "ferritin level", "repeated bleeding", "iron overload gene"),
    ("appendicitis", "pain moving to the right groin", "rebound tenderness",
     "abdominal CT", "appendix removal", "a blocked appendix"),
    ("achalasia", "trouble swallowing liquids", "regurgitation at night",
     "oesophageal manometry", "balloon dilatation", "loss of gullet nerves"),
))  # fmt: skip
NEUROLOGY = _specialty("neurology", (
    ("migraine", "one-sided throbbing headache", "zigzag lights",
     "clinical history", "triptans", "trigeminal irritation"),
    ("multiple sclerosis", "painful loss of vision", "tingling on bending the neck",
     "brain MRI", "interferon", "loss of myelin"),
    ("Parkinson disease", "a resting tremor", "a shuffling gait", "dopamine scan", "levodopa", "loss of nigral cells"),
    ("myasthenia gravis", "drooping lids at dusk", "weakness after chewing",
     "receptor antibody test", "pyridostigmine", "blocked acetylcholine receptors"),
    ("meningitis", "a stiff neck", "dislike of light", "lumbar puncture", "ceftriaxone", "meningococcus"),
    ("absence epilepsy", "brief blank stares", "eyelid flicker",
     "electroencephalogram", "ethosuximide", "thalamic discharges"),
    ("carpal tunnel syndrome", "tingling thumb at night", "wasting of the thumb pad",
     "nerve conduction study", "wrist splint", "a squeezed median nerve"),
    ("ischaemic stroke", "sudden weakness of one side", "loss of speech",
     "head CT", "thrombolysis", "a blocked cerebral artery"),
))  # fmt: skip
ENDOCRINOLOGY = _specialty("endocrinology", (
    ("Graves disease", "bulging eyes", "weight loss with good appetite",
     "thyroid antibody test", "carbimazole", "antibodies that drive the thyroid"),
    ("hypothyroidism", "intolerance of cold", "dry coarse hair",
     "thyrotropin level", "levothyroxine", "a failing thyroid"),
    ("Addison disease", "dark palm creases", "craving for salt",
     "corticotropin test", "hydrocortisone", "destroyed adrenal glands"),
    ("Cushing syndrome", "purple stretch marks", "a round face",
     "dexamethasone test", "adrenal surgery", "cortisol excess"),
    ("acromegaly", "growing hands", "widely spaced teeth",
     "growth factor level", "octreotide", "a growth hormone tumour"),
    ("type 1 diabetes", "thirst in a thin child", "breath smelling of fruit",
     "blood glucose", "insulin", "lost beta cells"),
    ("primary hyperparathyroidism", "kidney stones", "constipation with low mood",
     "calcium level", "parathyroid surgery", "a parathyroid adenoma"),
    ("phaeochromocytoma", "spells of sweating", "bursts of pallor",
     "urine metanephrines", "alpha blockers", "a catecholamine tumour"),
))  # fmt: skip
INFECTION = _specialty("infection", (
    ("malaria", "fever every other day", "travel to the tropics", "blood film", "artemether", "plasmodium"),
    ("Lyme disease", "a spreading ring rash", "a tick bite",
     "borrelia serology", "doxycycline", "a spirochaete from ticks"),
    ("syphilis", "a painless genital ulcer", "a rash on the palms",
     "treponemal test", "benzathine penicillin", "a pale spirochaete"),
    ("cholera", "rice-water stools", "sunken eyes", "stool culture", "oral rehydration", "a comma-shaped vibrio"),
    ("glandular fever", "sore throat with large nodes", "an enlarged spleen",
     "heterophile test", "rest and fluids", "Epstein-Barr virus"),
    ("shingles", "a band of blisters", "burning skin on one side", "lesion swab", "aciclovir", "varicella virus"),
    ("oral thrush", "white plaques that wipe off", "a burning tongue", "fungal smear", "nystatin", "candida"),
    ("threadworm", "itching at night", "restless sleep in a child", "tape test", "mebendazole", "a small round worm"),
))  # fmt: skip
RHEUMATOLOGY = _specialty("rheumatology", (
    ("gout", "a hot swollen big toe", "chalky ear nodules", "joint fluid crystals", "allopurinol", "uric acid"),
    ("rheumatoid arthritis", "stiff knuckles each morning", "drifting fingers",
     "citrulline antibodies", "methotrexate", "immune attack on the synovium"),
    ("ankylosing spondylitis", "back stiffness eased by exercise", "heel pain in a young man",
     "sacroiliac MRI", "naproxen", "the B27 antigen"),
    ("giant cell arteritis", "scalp tenderness", "jaw pain on chewing",
     "temporal biopsy", "prednisolone", "inflamed temporal arteries"),
    ("lupus", "a butterfly rash", "mouth ulcers with joint pain",
     "nuclear antibodies", "hydroxychloroquine", "antibodies to nuclear DNA"),
    ("osteoporosis", "loss of height", "a wrist broken by a trip",
     "bone density scan", "alendronate", "thin bone after menopause"),
    ("osteoarthritis", "knee pain late in the day", "bony finger swellings",
     "knee radiograph", "exercise and weight loss", "worn cartilage"),
    ("systemic sclerosis", "tight shiny fingers", "fingers that whiten in cold",
     "centromere antibodies", "nifedipine", "excess collagen"),
))  # fmt: skip
HAEMATOLOGY = _specialty("haematology", (
    ("iron deficiency", "spoon-shaped nails", "a wish to chew ice",
     "serum iron", "ferrous sulphate", "slow blood loss"),
    ("pernicious anaemia", "a smooth sore tongue", "numb feet",
     "cobalamin level", "vitamin B12 injections", "lack of intrinsic factor"),
    ("sickle cell disease", "painful crises", "leg ulcers in youth",
     "haemoglobin electrophoresis", "hydroxycarbamide", "a beta globin mutation"),
    ("haemophilia", "bleeding into joints", "long bleeding in a boy",
     "factor VIII assay", "factor concentrate", "a missing clotting factor"),
    ("multiple myeloma", "bone pain with anaemia", "foamy urine",
     "protein electrophoresis", "bortezomib", "a clone of plasma cells"),
    ("chronic myeloid leukaemia", "a huge spleen", "early fullness at meals",
     "Philadelphia test", "imatinib", "a fused tyrosine kinase"),
    ("Hodgkin lymphoma", "rubbery neck nodes", "itch with drenching sweats",
     "node biopsy", "combination chemotherapy", "giant B cells"),
    ("polycythaemia vera", "itching after a bath", "a ruddy face", "JAK2 test", "venesection", "overactive marrow"),
))  # fmt: skip

SPECIALTIES: tuple[Specialty, ...] = (
    CARDIOLOGY,
    RESPIRATORY,
    GASTROENTEROLOGY,
    NEUROLOGY,
    ENDOCRINOLOGY,
    INFECTION,
    RHEUMATOLOGY,
    HAEMATOLOGY,
)
