//! Lists on one line of YAML.

use serde::{Serialize, Serializer};
use serde_saphyr::FlowSeq;

/// Writes a list on one line.
pub(super) fn flow<T: Serialize, S: Serializer>(list: &Vec<T>, serializer: S) -> Result<S::Ok, S::Error> {
    FlowSeq(list).serialize(serializer)
}

/// Writes a list on one line, if there is one.
pub(super) fn flow_option<T: Serialize, S: Serializer>(
    list: &Option<Vec<T>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    list.as_ref().map(FlowSeq).serialize(serializer)
}
