{{/*
What is made of one release is named <service>-<end of the deployment's id>. All of these take a
dict of root, service, deployment and release.
*/}}
{{- define "daybook-app.name" -}}
{{ printf "%s-%s" .service (trunc -8 .deployment) }}
{{- end }}

{{- define "daybook-app.labels" -}}
{{- with .root.Values.labels }}{{ toYaml . }}
{{ end -}}
app.kubernetes.io/instance: {{ include "daybook-app.name" . }}
app.kubernetes.io/managed-by: daybook
app.kubernetes.io/name: {{ .service }}
daybook.dev/deployment: {{ .deployment | quote }}
daybook.dev/service: {{ .service }}
{{- end }}

{{- define "daybook-app.metadata" -}}
metadata:
  name: {{ include "daybook-app.name" . }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "daybook-app.labels" . | nindent 4 }}
{{- end }}

{{/* Not empty if instances come and go by themselves. One that is stopped has none. */}}
{{- define "daybook-app.autoscaled" -}}
{{- if and (or .release.autoscaling .kubernetes.autoscaling) (gt (int .release.replicas) 0) }}true{{ end }}
{{- end }}

{{/*
The volumes of the definition that are mounted, as JSON: not those that have the name or the path of one
that is written by hand, nor the second of two at one path.
*/}}
{{- define "daybook-app.volumes" -}}
{{- $names := dict }}
{{- $paths := dict }}
{{- range .kubernetes.volumes }}
{{- $_ := set $names .name true }}
{{- $_ := set $paths (regexReplaceAll "/+$" .path "") true }}
{{- end }}
{{- $mounted := dict }}
{{- range $name, $volume := .release.volumes }}
{{- $path := regexReplaceAll "/+$" $volume.path "" }}
{{- if not (or (hasKey $names $name) (hasKey $paths $path)) }}
{{- $_ := set $paths $path true }}
{{- $_ := set $mounted $name $volume }}
{{- end }}
{{- end }}
{{- toJson $mounted }}
{{- end }}

{{/* How much a quantity is, such as 512Mi, for comparing it; 0 if it cannot be read. */}}
{{- define "daybook-app.amount" -}}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "P" 1000000000000000 "E" 1000000000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976 }}
{{- $number := regexFind "^[0-9.]+" . }}
{{- mulf (default "0" $number) (default 0 (get $units (trimPrefix $number .))) }}
{{- end }}

{{/* Not empty if a volume is one that only a single node can use at a time. */}}
{{- define "daybook-app.onOneNode" -}}
{{- range include "daybook-app.volumes" . | fromJson }}{{ if not .many_nodes }}true{{ end }}{{ end }}
{{- end }}

{{/* The releases of this cluster, as a list of such dicts; those of charts of others if it is of "charts". */}}
{{- define "daybook-app.each" -}}
{{- $root := .root -}}
{{- $template := .template -}}
{{- $of := default "releases" .of -}}
{{- range $service, $values := $root.Values.services }}
{{- range $deployment, $release := index $values $of }}
{{- if or (not $root.Values.cluster) (has $root.Values.cluster $release.clusters) }}
{{- include $template (dict "root" $root "service" $service "deployment" $deployment "release" $release "kubernetes" (default dict $release.kubernetes)) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
