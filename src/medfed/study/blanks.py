"""What only a person knows, asked for: the blanks that `medfed study fix` leaves in a study."""

from medfed.core.toml import Ask

RANGE = Ask(
    [],
    "the public, plausible [low, high]: from your data dictionary or a textbook, not from these "
    "patients",
)
SIZE = Ask(
    0,
    "the number of each site's training patients that may be published; it never follows the data",
)
CATEGORIES = Ask([], "the texts that may occur, publicly known")
FEATURE = Ask(
    {"range": [], "categories": []},
    "one of the two for each feature: a number's public, plausible range = [low, high], or "
    'a text\'s categories = ["a", "b"], from your data dictionary or a textbook, not from these '
    "patients. To leave columns out, list the others in data.features. Ranges of numbers that "
    "nobody can say: privacy.ranges_epsilon, at a price.",
)
EPSILON = Ask(0.0, "what the whole run may spend for any patient, such as 1.0")
