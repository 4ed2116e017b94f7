//! The embedded files. Each has one path; no path is looked up in a file system.

use axum::{Router, http::header, routing::get};

/// Path, media type and contents of each file.
pub(super) const FILES: &[(&str, &str, &str)] = &[
    ("/", "text/html; charset=utf-8", include_str!("page/index.html")),
    ("/style.css", "text/css; charset=utf-8", include_str!("page/style.css")),
    ("/icon.svg", "image/svg+xml", include_str!("page/icon.svg")),
    ("/app.js", "text/javascript; charset=utf-8", include_str!("page/app.js")),
    ("/agent.js", "text/javascript; charset=utf-8", include_str!("page/agent.js")),
    ("/dom.js", "text/javascript; charset=utf-8", include_str!("page/dom.js")),
    ("/filter.js", "text/javascript; charset=utf-8", include_str!("page/filter.js")),
    ("/table.js", "text/javascript; charset=utf-8", include_str!("page/table.js")),
    ("/map.js", "text/javascript; charset=utf-8", include_str!("page/map.js")),
    ("/nodes.js", "text/javascript; charset=utf-8", include_str!("page/nodes.js")),
    ("/details.js", "text/javascript; charset=utf-8", include_str!("page/details.js")),
    ("/panels.js", "text/javascript; charset=utf-8", include_str!("page/panels.js")),
];

pub(super) fn router() -> Router {
    FILES.iter().fold(Router::new(), |router, &(path, kind, text)| {
        router.route(path, get(move || async move { ([(header::CONTENT_TYPE, kind)], text) }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_load_is_small_and_names_no_other_site() {
        let size: usize = FILES.iter().map(|(_, _, text)| text.len()).sum();
        assert!(size < 150 * 1024, "{size} bytes");
        for (path, _, text) in FILES {
            let foreign = text.replace("http://www.w3.org/2000/svg", "");
            assert!(
                !foreign.contains("http://") && !foreign.contains("https://"),
                "{path} names another site"
            );
            assert!(!text.contains("innerHTML") && !text.contains("eval("), "{path} could run foreign text");
        }
    }
}
