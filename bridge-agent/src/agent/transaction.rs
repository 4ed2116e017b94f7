//! One change of the configuration in every part of the node's state, or in none.

use super::{error::Error, term::Term};
use crate::config::Config;

/// A configuration to apply.
#[derive(Clone, Copy)]
pub(super) struct Next<'a> {
    pub(super) config: &'a Config,
    pub(super) term: Term<'a>,
}

/// A part of the node's state: the port pool, the packet filter, the packet path, the routes.
pub(super) trait Part {
    /// Reads, checks and compiles everything that `next` needs, and changes nothing.
    ///
    /// # Errors
    /// The part cannot be as `next` wants it.
    fn prepare<'a>(&'a mut self, next: Next<'a>) -> Result<Box<dyn Change + 'a>, Error>;
}

/// A prepared change of a part. Dropped before its commit, it has changed nothing.
pub(super) trait Change {
    /// Applies the change.
    ///
    /// # Errors
    /// The change was refused; the part is as it was before.
    fn commit(&mut self) -> Result<(), Error>;

    /// Returns to the state before the commit, since a later part has failed. A failure is logged.
    fn rollback(&mut self);

    /// Removes state that `next` does not want, after every part has committed. A failure is logged, and tried again later.
    fn finish(self: Box<Self>);
}

/// Applies `next` to the parts, in their order.
///
/// # Errors
/// A part has failed; every part is as it was before.
pub(super) fn apply<'a, const N: usize>(parts: [&'a mut dyn Part; N], next: Next<'a>) -> Result<(), Error> {
    let mut changes = parts.into_iter().map(|part| part.prepare(next)).collect::<Result<Vec<_>, _>>()?;
    for index in 0..N {
        if let Err(error) = changes[index].commit() {
            changes[..index].iter_mut().rev().for_each(|change| change.rollback());
            return Err(error);
        }
    }
    changes.into_iter().for_each(|change| change.finish());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Step {
        Prepare,
        Commit,
    }

    /// A part whose state is the role of the configuration, and the remains of the one before.
    #[derive(Clone, Debug, Default, PartialEq, Eq)]
    struct Fake {
        fails_at: Option<Step>,
        state: Vec<String>,
    }

    struct FakeChange<'a> {
        part: &'a mut Fake,
        next: String,
    }

    fn refused() -> Error {
        Error::Io { action: "refused", source: io::ErrorKind::Other.into() }
    }

    impl Part for Fake {
        fn prepare<'a>(&'a mut self, next: Next<'a>) -> Result<Box<dyn Change + 'a>, Error> {
            if self.fails_at == Some(Step::Prepare) {
                return Err(refused());
            }
            Ok(Box::new(FakeChange { part: self, next: format!("{:?}", next.config.role) }))
        }
    }

    impl Change for FakeChange<'_> {
        fn commit(&mut self) -> Result<(), Error> {
            if self.part.fails_at == Some(Step::Commit) {
                return Err(refused());
            }
            self.part.state.push(self.next.clone());
            Ok(())
        }

        fn rollback(&mut self) {
            assert_eq!(
                self.part.state.pop().as_ref(),
                Some(&self.next),
                "only a committed part is rolled back"
            );
        }

        fn finish(self: Box<Self>) {
            self.part.state.remove(0);
        }
    }

    fn applied(parts: &mut [Fake; 4]) -> Result<(), Error> {
        let config = crate::config::parse("role: host\n", None).unwrap().config;
        let [a, b, c, d] = parts;
        apply([a, b, c, d], Next { config: &config, term: Term::Good })
    }

    #[test]
    fn every_part_has_the_new_state_and_nothing_of_the_former() {
        let before = Fake { fails_at: None, state: vec!["before".to_owned()] };
        let mut parts = [before.clone(), before.clone(), before.clone(), before];
        applied(&mut parts).unwrap();
        assert!(parts.iter().all(|part| part.state == ["Host"]), "{parts:?}");
    }

    #[test]
    fn a_failure_in_any_part_leaves_every_part_as_it_was() {
        for failing in 0..4 {
            for step in [Step::Prepare, Step::Commit] {
                let mut parts: [Fake; 4] = std::array::from_fn(|index| Fake {
                    fails_at: (index == failing).then_some(step),
                    state: vec!["before".to_owned()],
                });
                let before = parts.clone();
                let error = applied(&mut parts).unwrap_err();
                assert!(error.to_string().starts_with("refused"), "{error}");
                assert_eq!(parts, before, "{step:?} of part {failing} fails");
            }
        }
    }
}
