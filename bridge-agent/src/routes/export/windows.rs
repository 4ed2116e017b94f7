//! Windows: PowerShell's `New-NetRoute`.

use std::fmt::Write;

use super::line::{ExportError, Format, Line};

/// Windows adds the interface's own metric to a route's, which ends at 9,999.
const MAX_METRIC: u32 = 9999;

/// Routes are written to the persistent and the active store; running it again replaces them. It stops at the first
/// error and says which.
pub(super) fn script(lines: &[Line], dev: &str) -> Result<String, ExportError> {
    let dev = quoted(dev);
    let mut text = format!(
        "# Run in an elevated PowerShell. Take away with: Remove-NetRoute -InterfaceAlias {dev} -DestinationPrefix NETWORK\n$ErrorActionPreference = 'Stop'\n"
    );
    for line in lines {
        line.not_mixed(Format::Windows)?;
        let hop = line.only(Format::Windows)?;
        let alias = hop.dev.as_deref().map_or_else(|| dev.clone(), quoted);
        _ = writeln!(text, "# {}", line.comment);
        _ = writeln!(
            text,
            "Get-NetRoute -InterfaceAlias {alias} -DestinationPrefix '{to}' -ErrorAction SilentlyContinue | Remove-NetRoute -Confirm:$false\n\
             New-NetRoute -InterfaceAlias {alias} -DestinationPrefix '{to}' -NextHop '{via}' -RouteMetric {metric} | Out-Null",
            to = line.to,
            via = hop.via,
            metric = line.metric.min(MAX_METRIC),
        );
    }
    Ok(text)
}

/// A PowerShell string: nothing in it is expanded.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
