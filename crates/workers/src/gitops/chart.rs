//! The chart that every project's chart depends on, in `base/charts/daybook-app` of its
//! repository.

/// Its files, by their path within it.
pub fn chart_files() -> [(&'static str, &'static str); 10] {
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
        "templates/configmap.yaml",
        "templates/deployment.yaml",
        "templates/disruption.yaml",
        "templates/httproute.yaml",
        "templates/service.yaml",
        "templates/volumes.yaml",
    ]
}
