"""Hand-written words of eight business sectors, from which synthetic financial news is composed.

`strengths` are measures a company likes to see rise, `burdens` measures it likes to see fall. `prizes` are things
it likes to obtain, `blows` things it likes to escape. `cheers`, `sighs` and `shrugs` are how markets react to good,
bad and indifferent news; only the unlabelled corpus uses them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sector:
    """The vocabulary of one business sector."""

    name: str
    suffixes: tuple[str, ...]
    strengths: tuple[str, ...]
    burdens: tuple[str, ...]
    prizes: tuple[str, ...]
    blows: tuple[str, ...]
    rises: tuple[str, ...]
    falls: tuple[str, ...]
    cheers: tuple[str, ...]
    sighs: tuple[str, ...]
    shrugs: tuple[str, ...]


BANKING = Sector(
    name="banking",
    suffixes=("Bank", "Savings", "Credit"),
    strengths=("deposits", "net interest income", "fee income", "capital", "new lending", "the lending margin"),
    burdens=("bad loans", "loan losses", "late payments", "write-offs", "funding costs", "fraud claims"),
    prizes=("the deposit licence", "the payroll mandate", "the cheap credit line", "the rating upgrade"),
    blows=("the capital penalty", "the money laundering case", "the rating cut", "the refund order"),
    rises=("swelled", "mounted"),
    falls=("thinned", "melted"),
    cheers=("Its bonds firmed.", "Depositors queued up.", "Lenders trusted it more."),
    sighs=("Its bonds weakened.", "Depositors left.", "Lenders trusted it less."),
    shrugs=("Its bonds did not react.", "Depositors took no notice."),
)
INSURANCE = Sector(
    name="insurance",
    suffixes=("Insurance", "Mutual", "Life"),
    strengths=("premiums", "policy sales", "the solvency ratio", "the renewal rate", "reserves", "investment gains"),
    burdens=("claims", "storm losses", "policy lapses", "the loss ratio", "handling expenses", "payout disputes"),
    prizes=("the fleet policy", "the pension mandate", "the reinsurance cover", "the state scheme"),
    blows=("the flood bill", "the reserve shortfall", "the mis-selling case", "the premium cap"),
    rises=("built up", "piled up"),
    falls=("abated", "receded"),
    cheers=("Brokers recommended it.", "Underwriters smiled.", "Policyholders felt safer."),
    sighs=("Brokers warned against it.", "Underwriters frowned.", "Policyholders felt exposed."),
    shrugs=("Brokers kept their advice.", "Underwriters said little."),
)
SHIPPING = Sector(
    name="shipping",
    suffixes=("Lines", "Shipping", "Maritime"),
    strengths=("freight rates", "cargo volumes", "charter income", "fleet use", "container bookings", "port calls"),
    burdens=("bunker bills", "port delays", "idle tonnage", "empty voyages", "canal fees", "hull repairs"),
    prizes=("the long charter", "the berth", "the grain cargo", "the ferry route"),
    blows=("the arrest order", "the spill charge", "the canal ban", "the crew strike"),
    rises=("steamed higher", "surged"),
    falls=("ran aground", "ebbed"),
    cheers=("Charterers came aboard.", "The harbour buzzed.", "Captains were merry."),
    sighs=("Charterers sailed away.", "The harbour fell silent.", "Captains were grim."),
    shrugs=("Charterers waited.", "The harbour went about its day."),
)
ENERGY = Sector(
    name="energy",
    suffixes=("Energy", "Power", "Petroleum"),
    strengths=("oil output", "power sales", "proven reserves", "refining margins", "grid income", "gas flows"),
    burdens=("outages", "pipeline leaks", "drilling costs", "grid losses", "carbon charges", "flaring"),
    prizes=("the drilling permit", "the supply contract", "the wind concession", "the grid connection"),
    blows=("the windfall tax", "the blowout inquiry", "the plant closure", "the export ban"),
    rises=("flared up", "powered ahead"),
    falls=("dried up", "ran low"),
    cheers=("Traders bid for the stock.", "Partners offered more money.", "The field looked rich."),
    sighs=("Traders dumped the stock.", "Partners withheld money.", "The field looked poor."),
    shrugs=("Traders ignored the stock.", "Partners kept their terms."),
)
RETAIL = Sector(
    name="retail",
    suffixes=("Stores", "Retail", "Markets"),
    strengths=("store sales", "footfall", "basket size", "online orders", "gift card sales", "loyalty sign-ups"),
    burdens=("markdowns", "unsold stock", "theft", "product returns", "store rents", "complaints"),
    prizes=("the flagship lease", "the school uniform order", "the brand franchise", "the delivery deal"),
    blows=("the product recall", "the pricing probe", "the warehouse walkout", "the data breach"),
    rises=("bulged", "rang up gains"),
    falls=("dwindled", "wilted"),
    cheers=("Shoppers flocked in.", "Suppliers gave longer credit.", "The tills were lively."),
    sighs=("Shoppers drifted off.", "Suppliers asked for cash.", "The tills were quiet."),
    shrugs=("Shoppers hardly noticed.", "Suppliers kept the same terms."),
)
CHIPS = Sector(
    name="chips",
    suffixes=("Semiconductor", "Devices", "Microsystems"),
    strengths=("wafer starts", "chip orders", "the yield", "design wins", "the order backlog", "sensor shipments"),
    burdens=("defects", "scrap", "inventory days", "lead times", "test failures", "tool downtime"),
    prizes=("the foundry deal", "the phone socket", "the patent", "the research grant"),
    blows=("the patent suit", "the export curb", "the import duty", "the clean room fire"),
    rises=("ramped", "scaled up"),
    falls=("throttled back", "tapered"),
    cheers=("Fund managers loaded up.", "Engineers celebrated.", "Customers booked ahead."),
    sighs=("Fund managers bailed out.", "Engineers despaired.", "Customers looked elsewhere."),
    shrugs=("Fund managers stayed put.", "Engineers carried on."),
)
PROPERTY = Sector(
    name="property",
    suffixes=("Properties", "Estates", "Homes"),
    strengths=("rents", "occupancy", "flat sales", "asset values", "building starts", "lease renewals"),
    burdens=("vacancies", "rent arrears", "evictions", "mortgage costs", "building delays", "repair bills"),
    prizes=("the planning consent", "the anchor tenant", "the land plot", "the tower contract"),
    blows=("the zoning refusal", "the cladding bill", "the rent freeze", "the eviction suit"),
    rises=("towered", "crept higher"),
    falls=("crumbled", "subsided"),
    cheers=("Valuers marked it up.", "Landlords envied it.", "Buyers signed quickly."),
    sighs=("Valuers marked it down.", "Landlords pitied it.", "Buyers walked out."),
    shrugs=("Valuers left it alone.", "Landlords made no comment."),
)
AIRLINES = Sector(
    name="airlines",
    suffixes=("Airways", "Air", "Aviation"),
    strengths=("passenger numbers", "load factors", "ticket sales", "seat income", "punctuality", "business fares"),
    burdens=("flight cancellations", "fuel bills", "lost bags", "landing fees", "refunds", "crew shortages"),
    prizes=("the landing slots", "the mail contract", "the codeshare", "the new hub"),
    blows=("the pilot strike", "the grounding order", "the noise levy", "the safety audit"),
    rises=("took off", "soared"),
    falls=("descended", "lost height"),
    cheers=("Travel agents pushed it.", "Lessors offered aircraft.", "Pilots cheered."),
    sighs=("Travel agents dropped it.", "Lessors recalled aircraft.", "Pilots grumbled."),
    shrugs=("Travel agents did nothing.", "Lessors changed no terms."),
)

SECTORS: tuple[Sector, ...] = (BANKING, INSURANCE, SHIPPING, ENERGY, RETAIL, CHIPS, PROPERTY, AIRLINES)

NAMES: tuple[str, ...] = (
    "Alder", "Beacon", "Cedar", "Delta", "Elm", "Falcon", "Granite", "Harbour", "Iris", "Juniper", "Kestrel",
    "Linden", "Maple", "North", "Orchid", "Pine", "Quartz", "River", "Summit", "Thorn", "Union", "Valley",
    "West", "York",
)  # fmt: skip
RISES: tuple[str, ...] = ("rose", "climbed", "grew", "jumped", "increased", "went up")
FALLS: tuple[str, ...] = ("fell", "dropped", "shrank", "slid", "declined", "went down")
HOLDS: tuple[str, ...] = ("held steady", "stayed level", "barely moved", "stood still")
RISE_NOUNS: tuple[str, ...] = ("a rise in", "an increase in", "growth in", "a jump in")
FALL_NOUNS: tuple[str, ...] = ("a fall in", "a drop in", "a decline in", "a slide in")
GAINS: tuple[str, ...] = ("won", "received", "was handed", "faced", "was given")
LOSSES: tuple[str, ...] = ("lost", "was spared", "missed", "was denied", "got rid of")
TIMES: tuple[str, ...] = (
    "in spring", "in summer", "in autumn", "in winter", "last year", "this month", "in March", "in June",
    "by two percent", "by five percent", "by a tenth", "by a third",
)  # fmt: skip
DAYS: tuple[str, ...] = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
