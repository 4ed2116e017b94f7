//! The rules of a policy by number.

use crate::model::Rule;

/// All rules of a policy, by index.
#[derive(Clone, Copy)]
pub(super) struct Numbered<'p> {
    pub(super) rules: &'p [Rule],
    pub(super) audited: &'p [Rule],
    /// Index of the first rule in audit mode.
    pub(super) first_audited: u32,
}

impl<'p> Numbered<'p> {
    pub(super) fn get(&self, index: u32) -> &'p Rule {
        match index.checked_sub(self.first_audited) {
            Some(audited) => &self.audited[audited as usize],
            None => &self.rules[index as usize],
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &'p Rule)> + use<'p> {
        (0..).zip(self.rules).chain((self.first_audited..).zip(self.audited))
    }
}
