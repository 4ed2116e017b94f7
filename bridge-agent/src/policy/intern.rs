//! Equal things get one number.

use std::collections::HashMap;
use std::hash::Hash;

/// Numbers distinct values from 0 on, in the order they come.
pub(super) struct Interner<T> {
    numbers: HashMap<T, u32>,
    values: Vec<T>,
}

impl<T: Clone + Eq + Hash> Interner<T> {
    /// `zero` becomes number 0.
    pub(super) fn new(zero: T) -> Self {
        Self { numbers: HashMap::from([(zero.clone(), 0)]), values: vec![zero] }
    }

    /// The number of `value`.
    pub(super) fn number(&mut self, value: T) -> u32 {
        if let Some(&number) = self.numbers.get(&value) {
            return number;
        }
        let number = u32::try_from(self.values.len()).expect("memory ends before 2^32 values");
        self.values.push(value.clone());
        self.numbers.insert(value, number);
        number
    }

    /// The value of a number that [`Self::number`] gave.
    pub(super) fn value(&self, number: u32) -> &T {
        &self.values[number as usize]
    }

    /// Every value, by number.
    pub(super) fn values(&self) -> &[T] {
        &self.values
    }
}
