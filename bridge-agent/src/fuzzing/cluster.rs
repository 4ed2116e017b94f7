//! The cluster file (`routes.file`).

use crate::routes::ClusterFile;

/// What is accepted has routes to whole networks by way of somebody, and says the same when it is written out and read
/// again; what is refused is refused with the name of the file and a reason.
///
/// # Panics
/// It is not so.
pub fn cluster(input: &[u8]) -> bool {
    const NAME: &str = "cluster.yaml";
    let Ok(text) = str::from_utf8(input) else { return false };
    let file = match ClusterFile::parse(text, NAME.as_ref()) {
        Ok(file) => file,
        Err(error) => {
            let said = error.to_string();
            assert!(said.strip_prefix(NAME).is_some_and(|reason| reason.len() > 2), "{said}");
            return false;
        }
    };
    let routes = file.routes();
    for route in &routes {
        assert_eq!(route.to, route.to.trunc(), "{route}");
    }
    let written = serde_saphyr::to_string(&file).expect("no value fails to be written");
    match ClusterFile::parse(&written, NAME.as_ref()) {
        Ok(again) => assert_eq!(again, file, "{written}"),
        Err(error) => panic!("what was written is refused: {error}\n{written}"),
    }
    true
}
