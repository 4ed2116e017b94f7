//! The cluster file (`routes.file`).

use crate::routes::ClusterFile;

/// An accepted file has routes to whole networks through a next hop, and is the same when it is written out and read
/// again; a refusal names the file and a reason.
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
        Err(error) => panic!("the written file is refused: {error}\n{written}"),
    }
    true
}
