"""Canaries: values that occur once in a source, in whatever may identify somebody, and a search for them.

The keywords are attributes of PS3.15 table E.1-1, "Application Level Confidentiality Profile Attributes", and free texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pydicom import config
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset as DicomDataset
from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence

from ich_prep.dataset import Dataset
from ich_prep.phantom.files import CT_IMAGE, EXPLICIT_LE

LISTED = """
AffectedSOPInstanceUID ConcatenationUID ContextGroupExtensionCreatorUID CreatorVersionUID DeviceUID
DigitalSignatureUID DimensionOrganizationUID DoseReferenceUID FailedSOPInstanceUIDList FiducialUID FrameOfReferenceUID
InstanceCreatorUID IrradiationEventUID LargePaletteColorLookupTableUID MediaStorageSOPInstanceUID
ObservationSubjectUIDTrial ObservationUID PaletteColorLookupTableUID PresentationDisplayCollectionUID
PresentationSequenceCollectionUID ReferencedDoseReferenceUID ReferencedFrameOfReferenceUID
ReferencedGeneralPurposeScheduledProcedureStepTransactionUID ReferencedObservationUIDTrial ReferencedSOPInstanceUID
ReferencedSOPInstanceUIDInFile RelatedFrameOfReferenceUID RequestedSOPInstanceUID SOPInstanceUID SeriesInstanceUID
SourceFrameOfReferenceUID SpecimenUID StorageMediaFileSetUID StudyInstanceUID SynchronizationFrameOfReferenceUID
TargetUID TemplateExtensionCreatorUID TemplateExtensionOrganizationUID TrackingUID TransactionUID UID
VolumeFrameOfReferenceUID AcquisitionDate AcquisitionDateTime AcquisitionTime AdmittingDate AdmittingTime
AssertionDateTime AttributeModificationDateTime CalibrationDateTime ContentDate ContentTime ContributionDateTime
CurveDate CurveTime DateOfLastCalibration DateOfLastDetectorCalibration DateOfSecondaryCapture DateTime Date
DecayCorrectionDateTime DischargeDate DischargeTime EndAcquisitionDateTime ExpectedCompletionDateTime
FillerOrderNumberImagingServiceRequest FrameAcquisitionDateTime FrameReferenceDateTime InstanceCoercionDateTime
InstanceCreationDate InstanceCreationTime InterventionDrugStartTime IssueDateOfImagingServiceRequest
IssueTimeOfImagingServiceRequest LastMenstrualDate ModifiedImageDate ModifiedImageTime ObservationDateTime OverlayDate
OverlayTime PatientBirthDate PatientBirthTime PerformedProcedureStepEndDate PerformedProcedureStepEndDateTime
PerformedProcedureStepEndTime PerformedProcedureStepStartDate PerformedProcedureStepStartDateTime
PerformedProcedureStepStartTime PresentationCreationDate PresentationCreationTime RadiopharmaceuticalStartDateTime
RadiopharmaceuticalStopDateTime ReferencedDateTime ScheduledAdmissionDate ScheduledDischargeDate
ScheduledProcedureStepEndDate ScheduledProcedureStepEndTime ScheduledProcedureStepStartDate
ScheduledProcedureStepStartDateTime ScheduledProcedureStepStartTime ScheduledStudyStartDate ScheduledStudyStopDate
SeriesDate SeriesTime SOPAuthorizationDateTime StartAcquisitionDateTime StructureSetDate StructureSetTime
StudyArrivalDate StudyCompletionDate StudyDate StudyReadDate StudyTime StudyVerifiedDate TimeOfLastCalibration
TimeOfSecondaryCapture Time TreatmentDate TreatmentTime VerificationDateTime ConsultingPhysicianName
ContentCreatorName DistributionName HumanPerformerName InterpretationApproverSequence InterpretationAuthor
InterpretationRecorder InterpretationTranscriber NameOfPhysiciansReadingStudy NamesOfIntendedRecipientsOfResults
OperatorsName OrderEnteredBy PatientBirthName PatientMotherBirthName PatientName PerformingPhysicianName PersonName
PhysicianApprovingInterpretation PhysiciansOfRecord ReferringPhysicianName RequestingPhysician ResponsiblePerson
ReviewerName ScheduledHumanPerformersSequence ScheduledPerformingPhysicianName VerifyingObserverName
ActualHumanPerformersSequence AccessionNumber AcquisitionComments AcquisitionDeviceProcessingDescription
AcquisitionProtocolDescription AdditionalPatientHistory AdmissionID AdmittingDiagnosesDescription Allergies Arbitrary
AuthorObserverSequence BranchOfService CassetteID CommentsOnRadiationDose CommentsOnThePerformedProcedureStep
ConfidentialityCode ConfidentialityConstraintOnPatientDataDescription ContrastBolusAgent ContributionDescription
ConvolutionKernel CountryOfResidence CurrentPatientLocation DataSetTrailingPadding DerivationDescription DetectorID
DeviceDescription DeviceSerialNumber DeviceSettingDescription DischargeDiagnosisDescription DistributionAddress
EntranceDoseInmGy EquipmentFrameOfReferenceDescription EthnicGroup FrameComments GantryID GeneratorID
GraphicAnnotationSequence HumanPerformerOrganization IconImageSequence IdentifyingComments ImageComments
ImagePresentationComments ImagingServiceRequestComments Impressions InstitutionAddress InstitutionName
InstitutionalDepartmentName InstitutionalDepartmentTypeCodeSequence InsurancePlanIdentification
InterpretationDiagnosisDescription InterpretationIDIssuer InterpretationText IssuerOfAdmissionID IssuerOfPatientID
IssuerOfServiceEpisodeID LabelText LensMake LensModel LensSerialNumber LensSpecification Manufacturer
ManufacturerModelName MedicalAlerts MedicalRecordLocator MilitaryRank Occupation OriginalAttributesSequence
OtherPatientIDs OtherPatientIDsSequence OtherPatientNames OrderCallbackPhoneNumber OrderEntererLocation
OrderPlacerIdentifierSequence ParticipantSequence PatientAddress PatientComments PatientID PatientInstitutionResidence
PatientInsurancePlanCodeSequence PatientReligiousPreference PatientSexNeutered PatientState PatientTelephoneNumbers
PatientTransportArrangements PerformedLocation PerformedProcedureStepDescription PerformedProcedureStepID
PerformedStationAETitle PerformedStationName PerformedStationNameCodeSequence PersonAddress
PersonIdentificationCodeSequence PersonTelephoneNumbers PlacerOrderNumberImagingServiceRequest PlateID PreMedication
PregnancyStatus PrivateRecordUID ProtocolName ReasonForStudy ReasonForTheImagingServiceRequest
ReasonForTheRequestedProcedure RequestedContrastAgent RequestedProcedureComments RequestedProcedureDescription
RequestedProcedureID RequestedProcedureLocation RequestingService ReferencedPatientSequence ReferringPhysicianAddress
ReferringPhysicianTelephoneNumbers RegionOfResidence RequestAttributesSequence ResponsibleOrganization ResultsComments
ResultsDistributionListSequence ResultsID ResultsIDIssuer ScheduledPatientInstitutionResidence
ScheduledProcedureStepDescription ScheduledProcedureStepID ScheduledProcedureStepLocation ScheduledStationAETitle
ScheduledStationName ScheduledStudyLocation ScheduledStudyLocationAETitle SeriesDescription ServiceEpisodeDescription
ServiceEpisodeID SlideIdentifier SmokingStatus SourceImageSequence SpecialNeeds SpecimenAccessionNumber
SpecimenIdentifier StationName StudyComments StudyDescription StudyID StudyIDIssuer TextComments TextString
TopicAuthor TopicKeywords TopicSubject TopicTitle TreatmentMachineName VerifyingOrganization VisitComments
XRaySourceID BodyPartExamined PatientWeight PatientSize FilterType RescaleType ImageType RetrieveAETitle
StationAETitle
"""
SHORTEST = 8  # bytes of a canary: a date
FIRST_DATA_GROUP = 0x00080000  # below it are commands and the file meta information
KEYWORDS = tuple(
    name
    for name in LISTED.split()
    if (tag_for_keyword(name) or 0) >= FIRST_DATA_GROUP and dictionary_VR(name) not in {"US", "SS", "FD", "FL", "AT"}
)


class Canaries:
    """Makes canaries and knows all that it made."""

    def __init__(self) -> None:
        self.values: list[str] = []
        self._numbers = count(1)

    def text(self, form: str = "Käfig{:05d}Zq") -> str:
        """Return a value that occurs nowhere else; ``form`` has a place for its number."""
        value = form.format(next(self._numbers))
        self.values.append(value)
        return value

    def of(self, vr: str) -> Any:
        """Return a valid value of a VR (PS3.5 6.2), or of a sequence an item that has some."""
        forms = {
            "UI": "1.2.826.77131{:05d}.42",
            "TM": "101112.7{:05d}",
            "DT": "19870102030405.6{:05d}",
            "PN": "Kanärie{:05d}^Größe",
            "CS": "KANARIE{:05d}",
            "AE": "KANARIE{:05d}",
            "DS": "4{:05d}.7131",
            "IS": "7131{:05d}",
            "UR": "http://kanarie{:05d}.example/",
        }
        if vr == "SQ":
            item = DicomDataset()
            item.CodeMeaning, item.ReferencedSOPInstanceUID = self.text(), self.text(forms["UI"])
            deeper = DicomDataset()
            deeper.PatientName, deeper.StudyDate = self.text(forms["PN"]), self.date()
            item.PurposeOfReferenceCodeSequence = Sequence([deeper])
            return Sequence([item])
        if vr == "DA":
            return self.date()
        if vr in {"OB", "OW", "UN"}:
            return self.text("KANARIE{:05d}").encode()
        return self.text(forms.get(vr, "Käfig{:05d}Zq"))

    def date(self) -> str:
        number = next(self._numbers)
        value = f"{1901 + number // 336}{number // 28 % 12 + 1:02d}{number % 28 + 1:02d}"
        self.values.append(value)
        return value

    def needles(self) -> dict[bytes, str]:
        """Return the canaries in all the forms to look for, and what each is; ASCII in lower case."""
        found: dict[bytes, str] = {}
        for value in self.values:
            plain = value.encode("ascii", "ignore").decode()[
                -len("fig00000Zq") :
            ]  # without what an escape would change
            for text in (value.lower(), plain.lower()):
                for encoding in ("utf-8", "latin-1"):
                    found[text.encode(encoding)] = value
                found[text.encode("utf-16-le")[:-1]] = value  # without its last zero, it is in UTF-16 of either order
        return found


def canary_file(canaries: Canaries, attributes: Mapping[str, Any], *, utf8: bool = False) -> bytes:
    """Return a CT file with a canary in each attribute that may identify; ``attributes`` win, if not None."""
    file = DicomDataset()
    with config.disable_value_validation():
        for keyword in KEYWORDS:
            setattr(file, keyword, canaries.of(dictionary_VR(keyword).split(" or ", maxsplit=1)[0]))
        file.add_new(0x00110010, "LO", canaries.text())
        file.add_new(0x00111001, "LO", canaries.text())
        file.add_new(0x00111002, "UN", canaries.of("UN"))
        file.add_new(0x00111003, "SQ", canaries.of("SQ"))
        file.add_new(0x50003000, "OW", canaries.of("OW"))  # curve data
        file.add_new(0x60004000, "LT", canaries.text())  # overlay comments
        file.SpecificCharacterSet = "ISO_IR 192" if utf8 else "ISO_IR 100"
        for keyword, value in attributes.items():
            if value is not None and keyword != "TransferSyntax":
                setattr(file, keyword, value)
        if "PixelData" in file:
            file["PixelData"].VR = "OW"
        meta = FileMetaDataset()
        meta.FileMetaInformationGroupLength = 0
        meta.FileMetaInformationVersion = b"\x00\x01"
        meta.MediaStorageSOPClassUID = CT_IMAGE
        meta.MediaStorageSOPInstanceUID = canaries.of("UI")
        meta.TransferSyntaxUID = attributes.get("TransferSyntax", EXPLICIT_LE)
        meta.ImplementationClassUID = canaries.of("UI")
        meta.ImplementationVersionName = canaries.text("KANARIE{:05d}")
        meta.SourceApplicationEntityTitle = canaries.of("AE")
        meta.PrivateInformationCreatorUID = canaries.of("UI")
        meta.PrivateInformation = canaries.of("OB")
        file.file_meta = meta
        file.preamble = canaries.text("KANARIE{:05d}").encode().ljust(128, b"\0")
        out = BytesIO()
        dcmwrite(out, file, enforce_file_format=False, implicit_vr=False, little_endian=True)
    return out.getvalue()


def published_bytes(dataset: Dataset) -> Iterator[tuple[str, bytes]]:
    """Yield all that a dataset publishes: names, raw bytes, tables and JSON decoded, Parquet's metadata, and pixels."""
    path = dataset.path
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        yield f"name {name}", name.encode()
        if file.is_file():
            yield name, file.read_bytes()
        if file.suffix == ".json":
            yield f"{name}, decoded", json.dumps(json.loads(file.read_bytes()), ensure_ascii=False).encode()
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as table:
                yield f"{name}, metadata", f"{table.metadata}{table.metadata.metadata}{table.schema_arrow}".encode()
                read = table.read()
            for column in read.column_names:
                values = json.dumps(read[column].to_pylist(), ensure_ascii=False, default=str)
                yield f"{name}, {column}", values.encode()
    rows = np.flatnonzero(dataset.is_ok).tolist()
    pixels = np.empty((len(rows), *dataset.shape[1:]), dataset.dtype)
    dataset.read(rows, pixels)
    yield "pixels", pixels.tobytes()


def found_canaries(dataset: Dataset, canaries: Canaries) -> dict[str, set[str]]:
    """Return the canaries that a dataset publishes, by where."""
    published = {where: data.lower() + b"\0" + data for where, data in published_bytes(dataset)}
    everything = b"\0".join(published.values())
    ends = {everything[at : at + SHORTEST] for at in range(len(everything))}  # to look first for the last bytes: quick
    hits = {
        needle: value
        for needle, value in canaries.needles().items()
        if needle[-SHORTEST:] in ends and needle in everything
    }
    found = {where: {value for needle, value in hits.items() if needle in data} for where, data in published.items()}
    return {where: values for where, values in found.items() if values}


def write_raw(path: Path, data: bytes) -> None:
    """Write a file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
