//! The chart that every project's chart depends on, in `base/charts/daybook-app` of its
//! repository.

/// The trees, as git names them, of what it was before. Where a repository has one of them, nobody has
/// changed it, and it is renewed.
pub(super) const EARLIER: [&str; 5] = [
    "999160e2143876527d6b1444546ba9416bb4d8e2",
    "631ce2910e243ad620f0b8f8ea4e3289843a1a89",
    "0addd7f6e31f7e917da5c0783a2c1902c5e370b7",
    "1f1e1d02858c1d913b0b01df1d867570f2eed09d",
    "ddb53822733b829a08f399d1a6eb99bc0a346a24",
];

/// The file that makes what is committed of Helm charts.
pub(super) const OF_CHARTS: &str = "templates/charts.yaml";

/// Its files, by their path within it.
pub fn chart_files() -> [(&'static str, &'static str); 11] {
    macro_rules! files {
        ($($path:literal),+ $(,)?) => {
            [$(($path, include_str!(concat!("chart/", $path)))),+]
        };
    }
    files![
        "Chart.yaml",
        "values.yaml",
        "templates/_helpers.tpl",
        "templates/autoscaling.yaml",
        "templates/charts.yaml",
        "templates/configmap.yaml",
        "templates/deployment.yaml",
        "templates/disruption.yaml",
        "templates/httproute.yaml",
        "templates/service.yaml",
        "templates/volumes.yaml",
    ]
}
