"""The clinical dictionary: its facts agree with each other, and a name that may be something else
is not known.
"""

from collections import Counter
from fractions import Fraction

import pytest

from medfed.core.checks import StudyError
from medfed.data import units
from medfed.data.clinical import SOURCES, Variable, conversion, lookup, proposal, variables
from medfed.study import Data, Feature, Study, out_of_range

BY_NAME = {variable.name: variable for variable in variables()}

# What columns are called in public tables and in exports of hospitals, as "column -> variable,
# unit".
KNOWN = """
heart_rate -> heart_rate                                  # MIMIC-IV, derived tables
heart_rate_mean -> heart_rate
sbp_min -> systolic_pressure
sbp_ni -> systolic_pressure
dbp_max -> diastolic_pressure
mbp_mean -> mean_arterial_pressure
resp_rate_max -> respiratory_rate
temperature_vital -> body_temperature
spo2_min -> oxygen_saturation_pulse
hematocrit_min -> haematocrit
hemoglobin_max -> haemoglobin
platelets_min -> platelets
wbc_max -> leukocytes
albumin_min -> albumin
globulin_max -> globulin
total_protein_max -> total_protein
aniongap_min -> anion_gap
bicarbonate_max -> bicarbonate
bun_max -> urea_nitrogen
calcium_min -> calcium
chloride_max -> chloride
creatinine_max -> creatinine
glucose_min -> glucose
sodium_max -> sodium
potassium_min -> potassium
fibrinogen_min -> fibrinogen
inr_max -> inr
ptt_max -> partial_thromboplastin_time
ast_max -> aspartate_aminotransferase
alp_min -> alkaline_phosphatase
amylase_max -> amylase
bilirubin_total_max -> bilirubin_total
bilirubin_direct_max -> bilirubin_direct
ck_cpk_max -> creatine_kinase
ld_ldh_max -> lactate_dehydrogenase
lactate_max -> lactate
baseexcess_min -> base_excess
pao2fio2ratio_min -> oxygenation_ratio
aado2 -> alveolar_arterial_gradient
carboxyhemoglobin_max -> carboxyhaemoglobin
methemoglobin_max -> methaemoglobin
gcs_motor -> gcs_motor
gcs_eyes -> gcs_eye
urineoutput_24hr -> urine_output_day
admission_age -> age
anchor_age -> age
weight_admit -> body_weight
Alanine Aminotransferase (ALT) -> alanine_aminotransferase # MIMIC, labels
Asparate Aminotransferase (AST) -> aspartate_aminotransferase
Bilirubin, Total -> bilirubin_total
Calcium, Total -> calcium
Free Calcium -> ionised_calcium
Urea Nitrogen -> urea_nitrogen
White Blood Cells -> leukocytes
Platelet Count -> platelets
Creatine Kinase (CK) -> creatine_kinase
Lactate Dehydrogenase (LD) -> lactate_dehydrogenase
Prothrombin time (PT) -> prothrombin_time
% Hemoglobin A1c -> hba1c
NTproBNP -> nt_probnp
Thyroid Stimulating Hormone -> thyrotropin
Arterial Blood Pressure systolic -> systolic_pressure
Non Invasive Blood Pressure mean -> mean_arterial_pressure
O2 saturation pulseoxymetry -> oxygen_saturation_pulse
Temperature Fahrenheit -> body_temperature, °F
Admission Weight (Kg) -> body_weight, kg
Height (cm) -> body_height, cm
Sodium, Whole Blood -> sodium
systemicsystolic -> systolic_pressure                     # eICU
noninvasivemean -> mean_arterial_pressure
heartrate -> heart_rate
sao2 -> oxygen_saturation_sample
etco2 -> end_tidal_carbon_dioxide
cvp -> central_venous_pressure
admissionweight -> body_weight
admissionheight -> body_height
WBC x 1000 -> leukocytes, 10^3/µL
platelets x 1000 -> platelets, 10^3/µL
total bilirubin -> bilirubin_total
bedside glucose -> glucose
direct HDL -> hdl_cholesterol
Hgb -> haemoglobin
Hct -> haematocrit
MCV -> mean_corpuscular_volume
RDW -> red_cell_distribution_width
anion gap -> anion_gap
ionized calcium -> ionised_calcium
FiO2 -> inspired_oxygen
PEEP -> peep
troponin - I -> troponin_i
DiasABP -> diastolic_pressure                             # PhysioNet 2012
NIDiasABP -> diastolic_pressure
NIMAP -> mean_arterial_pressure
NISysABP -> systolic_pressure
SysABP -> systolic_pressure
RespRate -> respiratory_rate
PaCO2 -> carbon_dioxide_pressure
PaO2 -> oxygen_pressure
HCO3 -> bicarbonate
Platelets -> platelets
TropI -> troponin_i
TropT -> troponin_t
Cholesterol -> cholesterol
ALP -> alkaline_phosphatase
Temp -> body_temperature
GCS -> gcs
Weight -> body_weight
O2Sat -> oxygen_saturation_pulse                          # PhysioNet 2019
DBP -> diastolic_pressure
EtCO2 -> end_tidal_carbon_dioxide
BaseExcess -> base_excess
Alkalinephos -> alkaline_phosphatase
Bilirubin_direct -> bilirubin_direct
Magnesium -> magnesium
Phosphate -> phosphate
TroponinI -> troponin_i
PTT -> partial_thromboplastin_time
Fibrinogen -> fibrinogen
ICULOS -> icu_length_of_stay
Age -> age
d1_glucose_max -> glucose                                 # other public tables
d1_sysbp_noninvasive_min -> systolic_pressure
h1_diasbp_invasive_max -> diastolic_pressure
d1_spo2_min -> oxygen_saturation_pulse
h1_lactate_max -> lactate
creatinine_apache -> creatinine
gcs_verbal_apache -> gcs_verbal
bmi -> body_mass_index
trestbps -> systolic_pressure
serum_creatinine -> creatinine
serum_sodium -> sodium
ejection_fraction -> left_ventricular_ejection_fraction
creatinine_phosphokinase -> creatine_kinase
resting bp s -> systolic_pressure
ap_hi -> systolic_pressure
cigsPerDay -> cigarettes_per_day
totChol -> cholesterol
sysBP -> systolic_pressure
blood_glucose_level -> glucose
HbA1c_level -> hba1c
Total_Bilirubin -> bilirubin_total
Alkaline_Phosphotase -> alkaline_phosphatase
Alamine_Aminotransferase -> alanine_aminotransferase
Total_Protiens -> total_protein
ph.ecog -> ecog
motor_UPDRS -> motor_updrs
Kreatinin [µmol/l] -> creatinine, µmol/L                  # German exports
Kreatinin i.S. -> creatinine
Krea (mg/dl) -> creatinine, mg/dL
Harnstoff [mg/dl] -> urea, mg/dL
Harnsäure -> uric_acid
HARNSAEURE -> uric_acid
Natrium [mmol/l] -> sodium, mmol/L
Na+ [mmol/l] -> sodium, mmol/L
K [mmol/l] -> potassium, mmol/L
Kalium im Serum -> potassium
Leukozyten [Gpt/l] -> leukocytes, 10^9/L
Leukozyten (G/l) -> leukocytes, 10^9/L
Thrombozyten /nl -> platelets, 10^9/L
Erythrozyten [T/l] -> erythrocytes, 10^12/L
Hämoglobin (g/dl) -> haemoglobin, g/dL
Haemoglobin_mmol_l -> haemoglobin, mmol/L
Hämatokrit [l/l] -> haematocrit, fraction
CRP [mg/l] -> c_reactive_protein, mg/L
PCT (ng/ml) -> procalcitonin, ng/mL
GPT -> alanine_aminotransferase
GPT (ALAT) [U/l] -> alanine_aminotransferase, U/L
ALT (U/l) -> alanine_aminotransferase, U/L
GOT [U/l] -> aspartate_aminotransferase, U/L
gGT -> gamma_glutamyltransferase
γ-GT [µkat/l] -> gamma_glutamyltransferase, µkat/L
AP [U/l] -> alkaline_phosphatase, U/L
Bilirubin gesamt -> bilirubin_total
Quick (%) -> prothrombin_activity, %
Gesamteiweiß [g/l] -> total_protein, g/L
Laktat arteriell -> lactate
Körpergröße in cm -> body_height, cm
Groesse_cm -> body_height, cm
Gewicht (kg) -> body_weight, kg
Alter bei Aufnahme -> age
RRsys -> systolic_pressure
RR diastolisch -> diastolic_pressure
Blutzucker -> glucose
BZ mg/dl -> glucose, mg/dL
Herzfrequenz_Mittelwert -> heart_rate
HF /min -> heart_rate, /min
Atemfrequenz -> respiratory_rate
Körpertemperatur (°C) -> body_temperature, °C
Sauerstoffsättigung -> oxygen_saturation_pulse
Horowitz-Index -> oxygenation_ratio
Beatmungsdauer (h) -> ventilation_duration, hours
Verweildauer_Tage -> length_of_stay, days
Cholesterin -> cholesterol
HDL-Cholesterin -> hdl_cholesterol
Triglyzeride -> triglycerides
ASA-Klasse -> asa_class
créatinine (µmol/L) -> creatinine, µmol/L                 # French
Créatininémie -> creatinine
plaquettes -> platelets
hémoglobine -> haemoglobin
fréquence cardiaque -> heart_rate
Âge -> age
poids_kg -> body_weight, kg
glycémie à jeun -> glucose
natrémie -> sodium
protéine C réactive -> c_reactive_protein
DFG (mL/min/1.73m²) -> glomerular_filtration_rate, mL/min/1.73m²
FEVG -> left_ventricular_ejection_fraction
pression artérielle systolique -> systolic_pressure
creatinina -> creatinine                                  # Italian, Spanish
creatinina sérica (mg/dl) -> creatinine, mg/dL
emoglobina -> haemoglobin
globuli bianchi -> leukocytes
piastrine -> platelets
frequenza cardiaca max -> heart_rate
glicemia_mg_dl -> glucose, mg/dL
pressione sistolica -> systolic_pressure
altezza_cm -> body_height, cm
Età (anni) -> age, years
Età (a) -> age, years
peso -> body_weight
colesterolo totale -> cholesterol
plaquetas -> platelets
edad -> age
Age (years) -> age, years
Alter in Jahren -> age, years
mean_hr -> heart_rate
eGFR (mL/min/1.73 m^2) -> glomerular_filtration_rate, mL/min/1.73m²
egfr_ckd_epi_2021 -> glomerular_filtration_rate
GB (G/L) -> leukocytes, 10^9/L
TP (%) -> prothrombin_activity, %
PAS (mmHg) -> systolic_pressure, mmHg
Plaquetas (miles/mm3) -> platelets, 10^3/µL
PCR (mg/L) -> c_reactive_protein, mg/L
Hämoglobin i.B. [g/dl] -> haemoglobin, g/dL
Hb präoperativ -> haemoglobin
Blood Pressure (Systolic) -> systolic_pressure
Glascow coma scale total -> gcs
aPTT (sec) -> partial_thromboplastin_time, s
tensión arterial diastólica -> diastolic_pressure
frecuencia respiratoria -> respiratory_rate
estancia hospitalaria (días) -> length_of_stay, days
albúmina -> albumin
troponina T -> troponin_t
crea_mg_dl -> creatinine, mg/dL                           # how a unit may be written
creatinine_mgdl -> creatinine, mg/dL
creatinine_umol_L -> creatinine, µmol/L
creatinine (μmol/L) -> creatinine, µmol/L
creatinine_micromol_per_l -> creatinine, µmol/L
glucose_mmol_l_max_24h -> glucose, mmol/L
potassium (mEq/L) -> potassium, mEq/L
temp_c -> body_temperature, °C
temp_f -> body_temperature, °F
weight_lbs -> body_weight, lb
height_in -> body_height, in
pt_sec -> prothrombin_time, s
WBC (10^3/uL) -> leukocytes, 10^3/µL
WBC_K/uL -> leukocytes, 10^3/µL
FiO2 (%) -> inspired_oxygen, %
lymphocytes % -> lymphocyte_share, %
neutrophils_10^9/L -> neutrophil_count, 10^9/L
FEV1 (L) -> fev1, L
FEV1 (%) -> fev1_predicted, %
eGFR -> glomerular_filtration_rate
HR [1/min] -> heart_rate, /min
HR (bpm) -> heart_rate, /min
vancomycin_mg_l -> vancomycin_level, mg/L
ferritin_ug_l -> ferritin, µg/L
age_months -> age, months
lactate_6h -> lactate                                     # words beside a name
lactate 24 h -> lactate
first_creatinine -> creatinine
SodiumFirst24h -> sodium
MaxHeartRate -> heart_rate
hba1c_3months -> hba1c
mrs_90d -> modified_rankin
NIHSS -> nihss
SOFA_score -> sofa
APACHE II -> apache_ii
CHA2DS2-VASc -> cha2ds2_vasc
Charlson -> charlson
NEWS2 -> news
"""

# What is no variable of the dictionary, or may as well be something else.
UNKNOWN = """
id; patient_id; patientunitstayid; subject_id; hadm_id; mrn; name; Name; Vorname; date; Datum; birth_date;
admit_time; ward; Station; hospital; site; unit; Unit1; sex; gender; Geschlecht; race; ethnicity; smoker; diabetes;
label; target; outcome; death; mortality; SepsisLabel; feature_17; V1; x; x1; f3; column; Unnamed: 0; 0; 17; value;
max; mean; first; 24h; mg/dL; [mg/dl]; (); min; alt; ALT; Alt; na; NA; Na; k; K; p; ca; mg; cl; mi; pt; PT; pct; hf;
af; cp; ck mb ratio; pad; vt; co; ef; ht; wt; fe; tg; cea; svr; vte; hcm; bpd; pf; asa; resp; mets; mad; got; ld;
che; età; t3; t4; c3; una; scr; ves; pcr; anc; delta_creatinine; creatinine_delta; creatinine_change;
creatinine_diff; creatinine_slope; creatinine_sd; creatinine_std; creatinine_var; creatinine_cv; creatinine_count;
n_creatinine; creatinine_n; creatinine_flag; creatinine_missing; creatinine_measured; creatinine_abnormal;
creatinine_date; creatinine_time; creatinine_unit; log_creatinine; ln_crea; creatinine_log10; creatinine_z;
creatinine_zscore; creatinine_ratio; creatinine_x; creatinine_1; creatinine_mmHg; creatinine_h; low_creatinine;
high_bp; bp; blood_pressure; serum_weight; heart_rate_variability; hr_sd; weight_loss; weight_change_kg;
bmi_category; age_group; age_squared; sodium_intake; sodium_chloride; potassium_chloride; glucose_infusion; lithium;
digoxin; vancomycin; tacrolimus; insulin_therapy; iron_supplement; vitamin_k; protein_s; protein_c; hemoglobin_s;
urine; urine_output; urine_culture; total; score; pain; albuminuria; proteinuria; child_pugh; icu; los_mean;
icu_los_max; urine_output_day_max; length_of_stay_24h; temperature_sensor_id; oxygen_therapy; oxygen; gcs_missing;
sofa_change; pressure; volume; rate; level; concentration; hepatitis_b; factor_v; interleukin; area; time; years;
compliance; ketones; calcium_score; pt_d; pt_days; ptD; ga_s; rr_years; quick; Quick; wedge; K_d; insulin_24h;
insulin_max; glucose_csf; CSF glucose; pleural_ldh; urine_glucose; protein - CSF; base_deficit; eta_a; GaD; vt_l;
rr_s
"""


def _expected(line: str) -> tuple[str, str, str]:
    column, _, answer = line.partition(" -> ")
    name, _, unit = answer.partition(" # ")[0].strip().partition(", ")
    return column.strip(), name, unit


EXPECTED = [_expected(line) for line in KNOWN.strip().splitlines()]
NOT_KNOWN = [name.strip() for name in UNKNOWN.replace("\n", ";").split(";") if name.strip()]


def test_the_lists_are_long_enough() -> None:
    assert len(variables()) >= 200
    assert len({column for column, *_ in EXPECTED}) >= 150
    assert len(set(NOT_KNOWN)) >= 60


@pytest.mark.parametrize(
    ("column", "name", "unit"), EXPECTED, ids=[column for column, *_ in EXPECTED]
)
def test_a_usual_name_is_known(column: str, name: str, unit: str) -> None:
    found = lookup(column)
    assert found is not None and found.variable is not None
    assert (found.variable.name, found.unit) == (name, unit)


@pytest.mark.parametrize("column", NOT_KNOWN)
def test_a_name_that_may_be_something_else_is_not_known(column: str) -> None:
    assert lookup(column) is None
    assert proposal(column) == ()


@pytest.mark.parametrize(
    ("column", "names"),
    [
        ("pH", {"ph", "urine_ph"}),
        ("rr", {"respiratory_rate", "rr_interval"}),
        ("MAP", {"mean_arterial_pressure", "mean_airway_pressure"}),
        ("urea", {"urea", "urea_nitrogen"}),
        ("troponin", {"troponin_t", "troponin_i"}),
        ("Lymphozyten", {"lymphocyte_count", "lymphocyte_share"}),
        ("CK-MB", {"ck_mb_activity", "ck_mb_mass"}),
        ("fev1", {"fev1", "fev1_predicted"}),
        ("rbc", {"erythrocytes", "urine_erythrocytes"}),
        ("taille", {"body_height", "waist_circumference"}),
        ("CO2", {"bicarbonate", "carbon_dioxide_pressure"}),
        ("insulin", {"insulin", "insulin_dose_day"}),
    ],
)
def test_a_shared_name_is_offered_and_never_assumed(column: str, names: set[str]) -> None:
    found = lookup(column)
    assert found is not None and found.variable is None
    assert {variable.name for variable in found.variables} == names
    assert len(proposal(column)) > 1


def test_a_unit_decides_between_two_variables() -> None:
    pressure = lookup("CO2 [mmHg]")
    bicarbonate = lookup("CO2 [mmol/l]")
    assert pressure is not None and pressure.variable is BY_NAME["carbon_dioxide_pressure"]
    assert bicarbonate is not None and bicarbonate.variable is BY_NAME["bicarbonate"]


def test_what_was_taken_off_a_name_is_said() -> None:
    found = lookup("d1_serum_creatinine_max_24h [mg/dl]")
    assert found is not None
    assert found.stripped == ("24h", "max", "d1", "serum")


# --------------------------------------------------------------------------------------------------
# proposals


def test_a_name_with_a_unit_has_one_entry() -> None:
    (entry,) = proposal("Kreatinin [µmol/l]")
    assert entry == Feature(
        range=(4.42, 5310.0), log=True, unit="µmol/L", doc="creatinine in serum or plasma"
    )


def test_a_name_without_a_unit_has_an_entry_for_each_range() -> None:
    assert [entry.unit for entry in proposal("crea")] == ["mg/dL", "µmol/L"]
    # a mEq is a mmol: no choice to make
    assert [entry.unit for entry in proposal("sodium")] == ["mmol/L"]
    assert [entry.unit for entry in proposal("temp")] == ["°C", "°F"]


@pytest.mark.parametrize(
    ("column", "median", "unit"),
    [
        ("creatinine", 0.9, "mg/dL"),
        ("creatinine", 85, "µmol/L"),
        ("glucose", 105, "mg/dL"),
        ("glucose", 5.6, "mmol/L"),
        ("hemoglobin", 13.5, "g/dL"),
        ("hemoglobin", 135, "g/L"),
        ("temperature", 98.4, "°F"),
        ("temperature", 36.9, "°C"),
        ("height", 1.71, "m"),
        ("height", 171, "cm"),
        ("fio2", 0.4, "fraction"),
        ("fio2", 40, "%"),
        ("platelets", 220000, "/µL"),
    ],
)
def test_a_public_median_ranks(column: str, median: float, unit: str) -> None:
    ranked = proposal(column, median=median)
    assert ranked[0].unit == unit
    assert set(ranked) <= set(proposal(column))


@pytest.mark.parametrize(
    ("column", "median"),
    [
        ("age", 19700),
        ("creatinine", 0),
        ("creatinine", -1),
        ("ph", 140),
        ("sbp", 16000),
        ("sodium", 1),
    ],
)
def test_a_public_median_outside_every_range_leaves_none(column: str, median: float) -> None:
    assert proposal(column, median=median) == ()  # days, not years; a code; a gap


def test_every_entry_is_one_that_a_study_takes() -> None:
    entries = {
        f"{each.name} {unit}": each.feature(unit) for each in variables() for unit in each.units
    }
    assert out_of_range(Study(data=Data(dictionary=entries))) == []


# --------------------------------------------------------------------------------------------------
# facts


# Values that were measured and survived, or that a living person had, or that the definition
# allows.
EXTREMES = """
heart_rate: 0 /min, 300 /min
systolic_pressure: 30 mmHg, 320 mmHg
body_temperature: 13.7 °C, 46.5 °C, 56.7 °F
body_weight: 0.25 kg, 635 kg
body_height: 24 cm, 272 cm, 2.51 m
body_mass_index: 9 kg/m², 105 kg/m²
age: 0 years, 122 years
ph: 6.6, 7.8
lactate: 25 mmol/L, 0.3 mmol/L
oxygen_pressure: 19.1 mmHg, 600 mmHg
carbon_dioxide_pressure: 7.5 mmHg, 200 mmHg
oxygen_saturation_sample: 34 %
sodium: 99 mmol/L, 196 mmol/L
potassium: 1.2 mmol/L, 10 mEq/L
glucose: 10 mg/dL, 2000 mg/dL, 110 mmol/L
hba1c: 18 %, 3.5 %, 20 mmol/mol
creatinine: 0.1 mg/dL, 30 mg/dL, 2500 µmol/L
urea_nitrogen: 250 mg/dL
urea: 90 mmol/L
haemoglobin: 1.9 g/dL, 24 g/dL, 15 mmol/L
leukocytes: 0.1 10^9/L, 800 10^3/µL
platelets: 1 10^9/L, 3000 10^9/L
neutrophil_count: 0.02 10^9/L
inr: 0.8, 15
c_reactive_protein: 0.1 mg/L, 600 mg/L, 60 mg/dL
procalcitonin: 0.02 ng/mL, 500 ng/mL
ferritin: 2 µg/L, 100000 ng/mL
alanine_aminotransferase: 4 U/L, 15000 U/L, 200 µkat/L
aspartate_aminotransferase: 20000 U/L
creatine_kinase: 500000 U/L
bilirubin_total: 50 mg/dL, 800 µmol/L
triglycerides: 15000 mg/dL, 100 mmol/L
cholesterol: 1000 mg/dL
albumin: 0.8 g/dL, 55 g/L
calcium: 3.5 mg/dL, 20 mg/dL, 5 mmol/L
magnesium: 0.3 mg/dL, 15 mg/dL
phosphate: 0.4 mg/dL, 20 mg/dL
thyrotropin: 0.005 mU/L, 500 mU/L
troponin_t: 3 ng/L, 10 ng/mL
troponin_i: 2 ng/L, 500 ng/mL
nt_probnp: 5 pg/mL, 70000 ng/L
ammonia: 10 µmol/L, 1000 µmol/L
base_excess: -35 mmol/L, 30 mmol/L
bicarbonate: 2 mmol/L, 55 mmol/L
d_dimer: 0.05 mg/L, 100000 ng/mL
left_ventricular_ejection_fraction: 5 %, 0.8 fraction
inspired_oxygen: 21 %, 1 fraction
peep: 0 cmH2O, 30 mbar
central_venous_pressure: -5 mmHg, 40 cmH2O
gcs: 3, 15
sofa: 0, 24
apache_ii: 0, 71
nihss: 0, 42
modified_rankin: 0, 6
news: 0, 20
asa_class: 1, 6
rass: -5, 4
urine_output_day: 0 mL, 20 L
ethanol: 700 mg/dL
interleukin_6: 100000 pg/mL
"""


def test_the_sickest_are_within_the_ranges() -> None:
    for line in EXTREMES.strip().splitlines():
        name, _, values = line.partition(": ")
        for value, _, unit in (text.partition(" ") for text in values.split(", ")):
            low, high = BY_NAME[name].range_in(unit)
            assert low <= float(value) <= high, (name, value, unit)


def test_a_range_is_the_same_in_every_unit() -> None:
    for variable in variables():
        for unit in variable.units[1:]:
            back = variable.conversion(unit, variable.units[0])
            span = variable.range[1] - variable.range[0]
            for end, declared in zip(variable.range_in(unit), variable.range, strict=True):
                found = back(Fraction(end))
                assert abs(found - declared) <= max(abs(declared) / 90, span / 90), (
                    variable.name,
                    unit,
                )
            low, high = (back(Fraction(end)) for end in variable.range_in(unit))
            tiny = span / 10**12  # a float64 is not the fraction
            assert low <= variable.range[0] + tiny and high >= variable.range[1] - tiny, (
                variable.name,
                unit,
            )


def test_facts_are_of_their_kind() -> None:
    for variable in variables():
        low, high = variable.range
        assert low < high, variable.name
        assert variable.source in SOURCES and variable.doc and variable.units, variable.name
        assert not variable.log or low > 0, variable.name
        assert all(variable.measured_in(unit) for unit in (*variable.units, *variable.factors)), (
            variable.name
        )
        assert not variable.valence or variable.measured_in("mmol/L"), variable.name


def test_names_are_of_one_variable_unless_they_say_so() -> None:
    owners: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    for variable in variables():
        kept = {units.key(name) for name in (*variable.shared, *variable.short)}
        owners.update({units.key(name) for name in (variable.name, *variable.names)} - kept)
        shared.update({units.key(name) for name in variable.shared})
    assert [name for name, count in owners.items() if count > 1] == []
    assert [name for name, count in shared.items() if count < 2 or name in owners] == []


def test_a_variable_says_each_name_once() -> None:
    for variable in variables():
        names = (variable.name, *variable.names)
        assert len({units.key(name) for name in names}) == len(names), variable.name


def test_every_name_finds_its_variable() -> None:
    for variable in variables():
        kept = {units.key(name) for name in (*variable.shared, *variable.short)}
        for name in (variable.name, *variable.names, *variable.shared):
            found = lookup(name)
            if units.key(name) not in kept:
                assert found is not None and found.variable is variable, name
            elif name in variable.shared:
                assert found is not None and variable in found.variables, name
        for name in variable.short:
            assert lookup(name) is None, name


def test_short_names_are_read_beside_a_unit_of_theirs() -> None:
    for variable in variables():
        for name in variable.short if variable.units[0] else ():
            found = lookup(f"{name} [{variable.units[0]}]")
            assert found is not None and variable in found.variables, name


def _check_digit(number: str) -> int:
    """The check digit of a LOINC code, modulo 10 (Luhn)."""
    doubled = [
        int(digit) * (2 if place % 2 == 0 else 1) for place, digit in enumerate(reversed(number))
    ]
    return -sum(value // 10 + value % 10 for value in doubled) % 10


def test_loinc_codes_have_their_check_digit_and_their_name() -> None:
    codes = [(code, name) for variable in variables() for code, name in variable.loinc.items()]
    assert all(int(code[-1]) == _check_digit(code[:-2]) and name for code, name in codes)
    assert len({code for code, _ in codes}) == len(codes)


# --------------------------------------------------------------------------------------------------
# conversions


@pytest.mark.parametrize(
    ("variable", "unit", "into", "factor"),
    [  # the factors that tables of SI units print
        ("creatinine", "mg/dL", "µmol/L", 88.4),
        ("glucose", "mg/dL", "mmol/L", 0.0555),
        ("cholesterol", "mg/dL", "mmol/L", 0.0259),
        ("triglycerides", "mg/dL", "mmol/L", 0.0113),
        ("bilirubin_total", "mg/dL", "µmol/L", 17.1),
        ("urea_nitrogen", "mg/dL", "mmol/L", 0.357),
        ("urea", "mg/dL", "mmol/L", 0.1665),
        ("calcium", "mg/dL", "mmol/L", 0.2495),
        ("magnesium", "mg/dL", "mmol/L", 0.4114),
        ("magnesium", "mEq/L", "mmol/L", 0.5),
        ("calcium", "mEq/L", "mmol/L", 0.5),
        ("phosphate", "mg/dL", "mmol/L", 0.323),
        ("uric_acid", "mg/dL", "µmol/L", 59.48),
        ("haemoglobin", "g/dL", "mmol/L", 0.6206),
        ("lactate", "mg/dL", "mmol/L", 0.1123),
        ("iron", "µg/dL", "µmol/L", 0.179),
        ("cortisol", "µg/dL", "nmol/L", 27.59),
        ("free_thyroxine", "ng/dL", "pmol/L", 12.87),
        ("vitamin_d", "ng/mL", "nmol/L", 2.496),
        ("vitamin_b12", "pg/mL", "pmol/L", 0.738),
        ("testosterone", "ng/dL", "nmol/L", 0.0347),
        ("insulin", "mU/L", "pmol/L", 6.0),
        ("alanine_aminotransferase", "U/L", "µkat/L", 0.01667),
        ("oxygen_pressure", "kPa", "mmHg", 7.5006),
        ("ammonia", "µg/dL", "µmol/L", 0.587),
        ("folate", "ng/mL", "nmol/L", 2.266),
        ("urine_albumin_creatinine_ratio", "mg/g", "mg/mmol", 0.113),
        ("body_weight", "lb", "kg", 0.4536),
        ("leukocytes", "/µL", "10^9/L", 0.001),
        ("d_dimer", "ng/mL", "mg/L", 0.001),
        ("nt_probnp", "pg/mL", "pmol/L", 0.118),
    ],
)
def test_factors_are_those_of_the_textbooks(
    variable: str, unit: str, into: str, factor: float
) -> None:
    found = conversion(variable, unit, into)
    assert float(found.factor) == pytest.approx(factor, rel=4e-3)
    assert found.offset == 0


def test_conversions_are_exact_and_come_back() -> None:
    for variable in variables():
        for unit in variable.units:
            there = variable.conversion(variable.units[0], unit)
            assert variable.conversion(unit, variable.units[0]) == there.back()
            assert there.then(there.back()) == units.Conversion(Fraction(1))


def test_scales_with_another_zero_have_an_offset() -> None:
    assert conversion("body_temperature", "°C", "°F")(Fraction(37)) == Fraction("98.6")
    assert conversion("body_temperature", "°F", "°C")(Fraction(212)) == 100
    assert float(conversion("hba1c", "mmol/mol", "%")(Fraction(48))) == pytest.approx(6.5, abs=0.05)
    assert float(conversion("hba1c", "%", "mmol/mol")(Fraction(7))) == pytest.approx(53, abs=0.1)


def test_a_conversion_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(StudyError, match=r"unit='mg/dL' into 'mmHg'; expected units of one kind"):
        conversion("creatinine", "mg/dL", "mmHg")
    with pytest.raises(StudyError, match=r"unit='furlong' is not known; known: "):
        conversion("creatinine", "mg/dL", "furlong")
    with pytest.raises(
        StudyError, match=r"variable='creatinin' is not in the clinical dictionary; did you mean"
    ):
        conversion("creatinin", "mg/dL", "µmol/L")
    with pytest.raises(StudyError, match="expected units of one kind"):
        conversion("ferritin", "µg/L", "nmol/L")  # no molar mass is given: a mixture of chains


def test_a_spelling_means_one_unit_of_a_variable() -> None:
    twice = {
        (variable.name, spelling)
        for variable in variables()
        for spelling, meant in units.units_by_spelling().items()
        if _scales(variable, meant) > 1
    }
    assert twice == set()


def _scales(variable: Variable, meant: tuple[units.Unit, ...]) -> int:
    """How many different units of a variable a spelling may mean."""
    return len(
        {
            variable.conversion(unit.name, variable.units[0])
            for unit in meant
            if variable.measured_in(unit.name)
        }
    )
